"""Fast-weight attention written from its formulas: one head, one sentence and one token at a time, in float64."""

import torch
import torch.nn.functional as F

EPS = 1e-5


def loop_attention(attention, case, site, query, source=None, padding=None, key_norm=None):
    """What ``attention`` (built for ``case`` and ``site``) must return. query (T, B, C), source (S, B, C')."""
    source = query if source is None else source
    weights = {name: x.detach().double() for name, x in attention.state_dict().items()}
    out = torch.zeros(*query.shape[:2], attention.embed_dim, dtype=torch.float64)
    for b in range(query.shape[1]):
        real = [s for s in range(len(source)) if padding is None or not padding[b, s]]
        for h in range(attention.num_heads):
            head = Head(weights, attention, case, h, key_norm)
            columns = slice(h * attention.head_dim, (h + 1) * attention.head_dim)
            if site == "causal":
                for t in range(len(query)):
                    if t in real:
                        head.write(source[t, b])
                    out[t, b, columns] = head.read(query[t, b])
            else:
                # odd heads write from right to left
                for s in real if h % 2 == 0 else reversed(real):
                    head.write(source[s, b])
                for t in range(len(query)):
                    out[t, b, columns] = head.read(query[t, b])
    return F.linear(out, weights["out_proj.weight"], weights.get("out_proj.bias"))


class Head:
    """The fast weights S and the normaliser z of one head of one sentence."""

    def __init__(self, weights, attention, case, h, key_norm):
        self.weights, self.case, self.h, self.width = weights, case, h, attention.head_dim
        self.attention = attention
        delta = case.rule in ("delta", "gated-delta")
        signed = case.feature_map in ("tanh", "identity")
        self.key_norm = key_norm or ("none" if not delta else "l2" if signed else "sum")
        dk = attention.feature_map.output_dim
        self.state = torch.zeros(dk, self.width, dtype=torch.float64)
        self.z = torch.zeros(dk, dtype=torch.float64)

    def write(self, x):
        x = x.double()
        k, v = self.address("k_proj", x), self.project("v_proj", x)
        if self.case.rule == "sum":
            self.update(k, v, write=1, erase=0 * k, decay=1)
        elif self.case.rule == "delta":
            beta = self.beta(x)
            kappa = self.kappa(k, beta) if self.case.normalized else 1
            self.update(k, v, write=beta, erase=beta / kappa * k, decay=1, z_write=1)
        elif self.case.rule == "gated-sum":
            self.update(k, v, write=1, erase=0 * k, decay=self.decay(x))
        elif self.case.rule == "gated-delta":
            beta = self.beta(x)
            self.update(k, v, write=beta, erase=beta * k, decay=self.decay(x))
        elif self.case.rule == "gated-sum-peng":
            beta = self.beta(x)
            self.update(k, v, write=beta, erase=0 * k, decay=1 - beta)
        else:
            raise NotImplementedError(self.case.rule)

    def update(self, k, v, write, erase, decay, z_write=None):
        inserted = write * v - decay * (self.state.T @ erase)
        self.state = decay * self.state + torch.outer(k, inserted)
        self.z = decay * self.z + (write if z_write is None else z_write) * k

    def read(self, x):
        q = self.address("q_proj", x.double())
        out = self.state.T @ q
        if self.case.normalized:
            out = out / (self.z @ q + EPS)
        return out * self.width**-0.5

    def kappa(self, k, beta):
        kappa = torch.ones((), dtype=torch.float64) if self.z.eq(0).all() else self.z @ k
        if self.attention.rule.kappa_clamp:
            kappa = torch.maximum(kappa, beta * (k @ k) / 2)
        return kappa + EPS

    def beta(self, x):
        return torch.sigmoid(self.weights["rule.beta_proj.weight"][self.h] @ x)

    def decay(self, x):
        weight, bias = self.weights["rule.decay.proj.weight"], self.weights["rule.decay.proj.bias"]
        rate = self.weights["rule.decay.log_rate"][self.h].exp()
        return torch.exp(-rate * torch.log1p(torch.exp(weight[self.h] @ x + bias[self.h])))

    def project(self, name, x):
        rows = slice(self.h * self.width, (self.h + 1) * self.width)
        bias = self.weights.get(f"{name}.bias")
        return self.weights[f"{name}.weight"][rows] @ x + (0 if bias is None else bias[rows])

    def address(self, name, x):
        phi = self.features(self.project(name, x))
        size = {"none": 1, "sum": phi.sum(), "l2": phi.norm()}[self.key_norm]
        return phi * 0 if size == 0 else phi / size

    def features(self, x):
        kind = self.case.feature_map
        if kind == "elu":
            return torch.stack([a + 1 if a > 0 else a.exp() for a in x])
        if kind == "dpfp":
            both = [*x.clamp(min=0), *(-x).clamp(min=0)]
            rolls = range(1, self.attention.feature_map.nu + 1)
            return torch.stack([both[i] * both[i - j] for j in rolls for i in range(len(both))])
        if kind == "favor":
            projected = x @ self.weights["feature_map.projection"]
            kernel = torch.exp(-(x @ x) / 2) * torch.cat([projected.exp(), (-projected).exp()])
            return (kernel + 1e-4) / len(kernel) ** 0.5
        return {"relu": F.relu(x), "tanh": x.tanh(), "identity": x, "softmax": x.softmax(0)}[kind]
