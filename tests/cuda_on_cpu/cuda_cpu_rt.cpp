// Runs CUDA threads on one CPU thread. Each is a fiber that runs until its next barrier or warp operation;
// then the scheduler picks another, in order, in reverse order, or at random from a seed. Blocks run one
// after another.
//
// Found here, in every mode: threads that wait at different barriers or for ever, barriers and warp
// operations after some thread has left the kernel, shuffles from lanes that are not there, and failed
// assertions.
#include "cuda_cpu_rt.h"

#include <setjmp.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace ccpu {

Running running;
Mode mode;

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr int MAX_REPORTS = 32;  // the texts that are kept; the rest are only counted
constexpr int WARP = 32;

enum State { READY, AT_BARRIER, AT_WARP_OP, LEFT };

struct Fiber {
  ucontext_t start;  // makes the stack; after the first run the cheaper jmp_buf is used
  jmp_buf resume;
  bool started;
  char* stack;
  uint3 index;
  State state;
  // what it waits for, and then the result in `value`
  Site site;
  int op, argument, width;
  unsigned mask;
  uint64_t value;
};

struct Warp {
  unsigned epoch = 0;
  int waiting = 0, left = 0;
};

// the launch
void (*kernel_call)(void**);
void** kernel_arguments;
int order;
uint64_t random_state;
bool failed;  // stop now: an assertion or a deadlock
std::string reports;
int report_count;

// the block that runs
int block_number;
unsigned block_epoch;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::deque<int> ready;
int living, at_barrier;
Fiber* current;
jmp_buf scheduler;

// kept between launches
char* stacks;
size_t stack_count;

unsigned random_below(size_t n) {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (unsigned)((random_state >> 33) % n);
}

int thread_count() { return (int)fibers.size(); }
int index_of(const Fiber& fiber) { return (int)(&fiber - fibers.data()); }

std::string describe(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }
uint3 index_of_thread(unsigned n) {
  return {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
}
std::string describe(const Fiber& fiber) {
  return describe_thread((unsigned)block_number << BLOCK_BITS | index_of(fiber));
}
std::string describe_with_site(const Fiber& fiber) { return describe(fiber) + " at " + describe(fiber.site); }

bool same(Site a, Site b) { return a.line == b.line && !strcmp(a.file, b.file); }

// ---- fibers ----
void fiber_main() {
  kernel_call(kernel_arguments);
  current->state = LEFT;
  _longjmp(scheduler, 1);
}

// To the scheduler, and on from here when it resumes this fiber.
void wait_as(State state) {
  current->state = state;
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

void make_ready(Fiber& fiber) {
  fiber.state = READY;
  ready.push_back(index_of(fiber));
}

void run_until_it_waits(Fiber& fiber) {
  const unsigned thread = index_of(fiber);
  current = &fiber;
  threadIdx = fiber.index;
  running.moment = {(unsigned)block_number << BLOCK_BITS | thread, block_epoch, warps[thread / WARP].epoch};
  running.stack_begin = (uintptr_t)fiber.stack;
  running.stack_end = running.stack_begin + STACK_BYTES;
  running.inside_kernel = true;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  running.inside_kernel = false;
}

void allocate_stacks(size_t count) {
  if (stack_count >= count) return;
  if (stacks) munmap(stacks, stack_count * STACK_BYTES);
  stacks = (char*)mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stack_count = count;
}

void start_fiber(int thread) {
  Fiber& fiber = fibers[thread];
  fiber.stack = stacks + thread * STACK_BYTES;
  fiber.started = false;
  fiber.index = index_of_thread(thread);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = STACK_BYTES;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  make_ready(fiber);
}

// ---- barriers ----
void check_barrier(const Fiber& first) {
  for (const Fiber& fiber : fibers) {
    if (fiber.state != AT_BARRIER || (same(fiber.site, first.site) && fiber.op == first.op)) continue;
    report("divergent-barrier", 0, describe_with_site(first) + ", " + describe_with_site(fiber));
    break;
  }
  if (living != thread_count())
    report("barrier-after-exit", 0,
           "block " + std::to_string(block_number) + ": " + std::to_string(thread_count() - living) +
               " threads have left the kernel, the others wait at " + describe(first.site));
}

// Lets the threads on when all that live have come to a barrier.
void try_barrier() {
  if (!living || at_barrier != living) return;
  const Fiber* first = nullptr;
  int true_count = 0;
  for (const Fiber& fiber : fibers) {
    if (fiber.state != AT_BARRIER) continue;
    if (!first) first = &fiber;
    true_count += fiber.value != 0;
  }
  check_barrier(*first);
  const uint64_t results[] = {0, (uint64_t)true_count, true_count == living, true_count != 0};
  at_barrier = 0;
  ++block_epoch;
  memory_count_barrier();
  for (Fiber& fiber : fibers) {
    if (fiber.state != AT_BARRIER) continue;
    fiber.value = results[fiber.op];
    make_ready(fiber);
  }
}

// ---- warp operations ----
int source_lane(const Fiber& fiber, int lane) {
  const int width = fiber.width, segment = lane & ~(width - 1), in_segment = lane & (width - 1);
  switch (fiber.op) {
    case SHUFFLE_INDEX:
      return segment + (fiber.argument & (width - 1));
    case SHUFFLE_UP:
      return in_segment - fiber.argument >= 0 ? lane - fiber.argument : lane;
    case SHUFFLE_DOWN:
      return in_segment + fiber.argument < width ? lane + fiber.argument : lane;
    default:  // SHUFFLE_XOR
      return (lane ^ fiber.argument) < segment + width ? lane ^ fiber.argument : lane;
  }
}

// The lanes of `fiber`'s mask that have come, or none while one is still missing. The last warp may be a
// partial one.
unsigned lanes_present(const Fiber& fiber, int base) {
  unsigned present = 0;
  for (int lane = 0; lane < WARP && base + lane < thread_count(); ++lane) {
    if (!(fiber.mask >> lane & 1)) continue;
    const Fiber& other = fibers[base + lane];
    if (other.state == LEFT) continue;
    if (other.state != AT_WARP_OP || other.mask != fiber.mask) return 0;
    present |= 1u << lane;
  }
  return present;
}

void check_warp_op(const Fiber& fiber, int base) {
  for (int lane = 0; lane < WARP && base + lane < thread_count(); ++lane) {
    if (!(fiber.mask >> lane & 1)) continue;
    const Fiber& other = fibers[base + lane];
    if (other.state == LEFT)
      report(
          "warp-op-after-exit", 0,
          describe_with_site(fiber) + " names lane " + std::to_string(lane) + ", which has left the kernel");
    else if (other.op != fiber.op)
      report("divergent-warp-op", 0, describe_with_site(fiber) + ", " + describe_with_site(other));
  }
}

void finish_warp_op(int base, unsigned present) {
  uint64_t values[WARP] = {}, ballot = 0;
  for (int lane = 0; lane < WARP; ++lane) {
    if (!(present >> lane & 1)) continue;
    values[lane] = fibers[base + lane].value;
    ballot |= (values[lane] & 1) << lane;
  }
  for (int lane = 0; lane < WARP; ++lane) {
    if (!(present >> lane & 1)) continue;
    Fiber& fiber = fibers[base + lane];
    if (fiber.op == BALLOT) {
      fiber.value = ballot;
    } else if (fiber.op != SYNC_WARP) {
      const int source = source_lane(fiber, lane);
      fiber.value = present >> source & 1 ? values[source] : ~0ull;
      if (!(present >> source & 1))
        report("shuffle-from-absent-lane", 0,
               describe_with_site(fiber) + " reads lane " + std::to_string(source));
    }
    make_ready(fiber);
  }
}

// Lets the lanes on when all that the fiber's mask names have come.
void try_warp_op(const Fiber& fiber) {
  const int base = index_of(fiber) & ~(WARP - 1);
  Warp& warp = warps[base / WARP];
  if (!warp.left && base + WARP <= thread_count() && warp.waiting < __builtin_popcount(fiber.mask)) return;
  const unsigned present = lanes_present(fiber, base);
  if (!present) return;
  check_warp_op(fiber, base);
  const bool orders_memory = fiber.op == SYNC_WARP;  // a shuffle does not
  bool whole_warp = true;
  for (int lane = 0; lane < WARP && base + lane < thread_count(); ++lane)
    whole_warp &= (present >> lane & 1) || fibers[base + lane].state == LEFT;
  finish_warp_op(base, present);
  warp.waiting -= __builtin_popcount(present);
  if (orders_memory && whole_warp) ++warp.epoch;
}

void after_exit(const Fiber& fiber) {
  --living;
  const int base = index_of(fiber) & ~(WARP - 1);
  ++warps[base / WARP].left;
  for (int i = base; i < base + WARP && i < thread_count(); ++i)  // it may be the one that they wait for
    if (fibers[i].state == AT_WARP_OP) try_warp_op(fibers[i]);
}

// ---- blocks and launches ----
void report_deadlock() {
  std::map<std::string, int> waiting;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == LEFT) continue;
    const char* what = fiber.state == AT_BARRIER ? "__syncthreads" : "a warp operation";
    ++waiting[std::string(what) + " at " + describe(fiber.site)];
  }
  std::string text = "block " + std::to_string(block_number) + ":";
  for (const auto& place : waiting)
    text += " " + std::to_string(place.second) + " threads wait for " + place.first + ";";
  text.pop_back();
  report("deadlock", 0, text);
}

int take_ready() {
  if (order > 1) std::swap(ready[random_below(ready.size())], ready.back());
  const int thread = order == 0 ? ready.front() : ready.back();
  if (order == 0)
    ready.pop_front();
  else
    ready.pop_back();
  return thread;
}

void run_block(int number) {
  block_number = number;
  blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  memory_begin_block();
  ++block_epoch;
  for (Warp& warp : warps) warp.waiting = warp.left = 0;
  living = thread_count();
  at_barrier = 0;
  ready.clear();
  for (int i = 0; i < thread_count(); ++i) start_fiber(i);
  while (living && !failed) {
    if (ready.empty()) {
      report_deadlock();
      failed = true;
      break;
    }
    Fiber& fiber = fibers[take_ready()];
    run_until_it_waits(fiber);
    if (failed) break;
    if (fiber.state == LEFT) after_exit(fiber);
    if (fiber.state == AT_WARP_OP)
      try_warp_op(fiber);
    else
      try_barrier();
  }
}

std::vector<int> block_order(int count) {
  std::vector<int> blocks(count);
  for (int i = 0; i < count; ++i) blocks[i] = order == 1 ? count - 1 - i : i;
  if (order > 1)
    for (int i = count - 1; i > 0; --i) std::swap(blocks[i], blocks[random_below(i + 1)]);
  return blocks;
}

}  // namespace

void report(const char* kind, uintptr_t program_counter, const std::string& text) {
  if (report_count++ >= MAX_REPORTS) return;
  char place[32];
  snprintf(place, sizeof place, "\t%#lx\t", (unsigned long)program_counter);
  reports += kind + (place + text) + "\n";
}

void stop_launch() {
  failed = true;
  _longjmp(scheduler, 1);
}

std::string describe_thread(unsigned thread) {
  const uint3 i = index_of_thread(thread & ((1u << BLOCK_BITS) - 1));
  char text[96];
  snprintf(text, sizeof text, "block %u thread (%u,%u,%u)", thread >> BLOCK_BITS, i.x, i.y, i.z);
  return text;
}
std::string describe_running_thread() { return describe(*current); }

}  // namespace ccpu

using namespace ccpu;

extern "C" {

// ---- called by kernels ----
uint64_t ccpu_block_op(BlockOp op, bool predicate, Site site) {
  current->op = op;
  current->value = predicate;
  current->site = site;
  ++at_barrier;
  wait_as(AT_BARRIER);
  return current->value;
}

uint64_t ccpu_warp_op(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Site site) {
  const int thread = index_of(*current);
  current->op = op;
  current->mask = mask;
  current->value = value;
  current->argument = argument;
  current->width = width;
  current->site = site;
  if (!(mask >> thread % WARP & 1)) report("lane-not-in-its-mask", 0, describe_with_site(*current));
  ++warps[thread / WARP].waiting;
  wait_as(AT_WARP_OP);
  return current->value;
}

void ccpu_fail(const char* what, Site site) {
  report("failed", 0, std::string(what) + " at " + describe(site) + ", " + describe(*current));
  stop_launch();
}

// ---- called by cuda_executor.py ----
struct LaunchConfig {
  unsigned grid[3], block[3];
  size_t dynamic_shared_bytes;
  uint64_t seed;
  int order;  // of threads and blocks: 0 in order, 1 in reverse, 2 at random
  int mode;
};

// Returns the number of faults; ccpu_reports() has a line for each.
int ccpu_launch(void (*call)(void**), void** arguments, const LaunchConfig* config) {
  const unsigned *grid = config->grid, *block = config->block;
  kernel_call = call;
  kernel_arguments = arguments;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  order = config->order;
  mode = (Mode)config->mode;
  random_state = config->seed * 0x9E3779B97F4A7C15ull + 1;
  failed = false;
  reports.clear();
  report_count = 0;

  const int threads = (int)(block[0] * block[1] * block[2]);
  allocate_stacks(threads);
  fibers.resize(threads);
  warps.assign((threads + WARP - 1) / WARP, Warp());
  memory_begin_launch(config->dynamic_shared_bytes);
  for (int number : block_order((int)(grid[0] * grid[1] * grid[2]))) {
    run_block(number);
    if (failed) break;
  }
  return report_count;
}

const char* ccpu_reports() { return reports.c_str(); }
}
