// Watches the memory accesses of a kernel that was compiled with -fsanitize=thread. That option makes g++
// call a hook before every access; the hooks are the ones below, not those of libtsan, so nothing has to be
// preloaded.
//
// Mode COUNT adds up the traffic. Mode CHECK also keeps, for every byte of global and shared memory, who
// wrote and who read it last and between which barriers, and reports what no barrier orders. That depends
// little on the order in which the threads happen to run: two accesses that no barrier separates are found
// whichever comes first.
#include <link.h>
#include <string.h>

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "cuda_cpu_rt.h"

// The one array that kernels may declare as `extern __shared__`.
alignas(1024) thread_local unsigned char smem_raw[ccpu::MAX_DYNAMIC_SHARED];

namespace ccpu {
namespace {

constexpr unsigned NOBODY = ~0u;
constexpr size_t NEAR = 65536;     // an address this near to a buffer is described by its distance
constexpr size_t RED_ZONE = 4096;  // before and behind each buffer, where a wrong access does no harm

struct Shadow {  // of one byte
  Moment writer{NOBODY, 0, 0};
  Moment readers[2]{{NOBODY, 0, 0}, {NOBODY, 0, 0}};
  bool written_by_atomic = false, written = false;
};

struct GlobalTraffic {
  uint64_t read = 0, written = 0;                      // every access of every thread
  uint64_t read_per_block = 0, written_per_block = 0;  // every byte once a block
};
struct SharedTraffic {
  uint64_t accesses = 0, bytes = 0;
};

struct Buffer {  // global memory
  uintptr_t begin, end;
  bool read_only;
  std::string name;
  std::vector<Shadow> shadow;                       // CHECK only
  std::vector<unsigned> read_stamp, written_stamp;  // the last block (plus one) that read or wrote a byte
  GlobalTraffic traffic;
};

std::vector<Buffer> buffers;
size_t last_buffer;  // where the last access was found, most likely that of the next one too
std::vector<uintptr_t> initialisation_guards;
SharedTraffic shared_traffic;
uint64_t barriers;
std::set<std::pair<uintptr_t, std::string>> reported;  // one report for a place in the kernel and a kind

// This shared object: its image, its thread-local block (all of shared memory), and smem_raw inside the
// latter.
uintptr_t image_begin, image_end, image_base;
uintptr_t shared_begin, shared_end, dynamic_begin, dynamic_end;
std::vector<Shadow> static_shadow, dynamic_shadow;

int find_own_image(dl_phdr_info* info, size_t, void* own_address) {
  uintptr_t begin = ~(uintptr_t)0, end = 0, thread_local_size = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD) {
      begin = std::min(begin, start);
      end = std::max<uintptr_t>(end, start + header.p_memsz);
    }
    if (header.p_type == PT_TLS) thread_local_size = header.p_memsz;
  }
  if ((uintptr_t)own_address < begin || (uintptr_t)own_address >= end) return 0;
  image_begin = begin;
  image_end = end;
  image_base = info->dlpi_addr;
  shared_begin = (uintptr_t)info->dlpi_tls_data;
  shared_end = shared_begin + thread_local_size;
  return 1;
}

// ---- reports ----
// The return address lies behind the call of the hook, hence one less for the line of the access itself.
uintptr_t offset_in_image(uintptr_t return_address) { return return_address - image_base - 1; }

bool first_time(const char* kind, uintptr_t place) { return reported.insert({place, kind}).second; }

void report_access(const char* kind, uintptr_t return_address, const std::string& text) {
  if (first_time(kind, return_address))
    report(kind, offset_in_image(return_address), describe_running_thread() + text);
}

// The buffer that an address is nearest to, if any is near.
std::string describe_nearest_buffer(uintptr_t address) {
  std::string text;
  uintptr_t nearest = NEAR;
  for (const Buffer& buffer : buffers) {
    const std::string name = buffer.name + " (" + std::to_string(buffer.end - buffer.begin) + " bytes)";
    if (address >= buffer.begin && address < buffer.end) return " across the end of " + name;
    const bool past = address >= buffer.end;
    const uintptr_t distance = past ? address - buffer.end : buffer.begin - address;
    if (distance >= nearest) continue;
    nearest = distance;
    text = ", " + std::to_string(distance) + (past ? " bytes past " : " bytes before ") + name;
  }
  return text;
}

void report_outside(uintptr_t address, AccessKind kind, uintptr_t return_address) {
  const std::string how = kind == READ ? " reads" : " writes";
  const std::string place = address < NEAR ? " near a null pointer" : describe_nearest_buffer(address);
  report_access("out-of-bounds-global", return_address, how + place);
}

bool in_image(uintptr_t address) { return address >= image_begin && address < image_end; }

bool in_red_zone(uintptr_t address) {
  for (const Buffer& buffer : buffers)
    if (address >= buffer.begin - RED_ZONE && address < buffer.end + RED_ZONE - sizeof(double4)) return true;
  return false;
}

void refuse(uintptr_t address, AccessKind kind, uintptr_t return_address) {
  report_outside(address, kind, return_address);
  if (!in_red_zone(address)) stop_launch();  // or the process would die of it
}

// ---- races ----
bool ordered(const Moment& earlier, const Moment& now) {
  if (earlier.thread == NOBODY || earlier.thread == now.thread) return true;
  const unsigned difference = earlier.thread ^ now.thread;
  if (difference >> BLOCK_BITS) return false;  // nothing orders two blocks of a launch
  if (earlier.block_epoch != now.block_epoch) return true;
  return !(difference >> WARP_BITS) && earlier.warp_epoch != now.warp_epoch;
}

bool same_warp(const Moment& a, const Moment& b) { return a.thread >> WARP_BITS == b.thread >> WARP_BITS; }

// Two readers are enough if they are of two warps where possible: whoever writes next without a barrier
// differs from one of them, and a __syncwarp orders it after at most one.
void remember_reader(Shadow& byte, const Moment& now) {
  Moment* readers = byte.readers;
  if (readers[0].thread == now.thread || ordered(readers[0], now))
    readers[0] = now;
  else if (ordered(readers[1], now) || !same_warp(readers[0], now) || same_warp(readers[0], readers[1]))
    readers[1] = now;
}

struct Place {  // of a byte, for the reports
  const char* space;
  const std::string* buffer;  // of global memory
  uintptr_t offset, return_address;
};

void report_race(const char* kind, const Place& place, const char* how, const Moment& other) {
  std::string text = std::string(", ") + place.space + " byte " + std::to_string(place.offset);
  if (place.buffer) text += " of " + *place.buffer;
  if (how) text += how + describe_thread(other.thread);
  report_access(kind, place.return_address, text);
}

void check_byte(Shadow& byte, AccessKind kind, const Place& place) {
  const Moment& now = running.moment;
  if (kind != WRITE) {
    if (!place.buffer && !byte.written) report_race("uninitialised-shared-read", place, nullptr, now);
    if (!ordered(byte.writer, now) && !(kind == ATOMIC && byte.written_by_atomic))
      report_race("race-read-after-write", place, ", written by ", byte.writer);
  }
  if (kind == READ) return remember_reader(byte, now);
  if (kind == WRITE && !ordered(byte.writer, now))
    report_race("race-write-after-write", place, ", written by ", byte.writer);
  for (const Moment& reader : byte.readers) {
    if (ordered(reader, now)) continue;
    report_race("race-write-after-read", place, ", read by ", reader);
    break;
  }
  byte.writer = now;
  byte.written_by_atomic = kind == ATOMIC;
  byte.written = true;
}

// ---- the two memories ----
void shared_access(uintptr_t address, size_t bytes, AccessKind kind, uintptr_t return_address) {
  for (uintptr_t guard : initialisation_guards)
    if (address - shared_begin - guard < 8) return;
  ++shared_traffic.accesses;
  shared_traffic.bytes += kind == ATOMIC ? 2 * bytes : bytes;
  if (mode != CHECK) return;
  const bool behind_static = address >= dynamic_begin, dynamic = behind_static && address < dynamic_end;
  if (behind_static && address + bytes > dynamic_end && address < dynamic_begin + MAX_DYNAMIC_SHARED) {
    report_access("out-of-bounds-shared", return_address,
                  ", dynamic shared byte " + std::to_string(address - dynamic_begin) + " of " +
                      std::to_string(dynamic_end - dynamic_begin));
    return;
  }
  Place place{dynamic ? "dynamic shared" : "static shared", nullptr, address - shared_begin, return_address};
  if (dynamic)
    place.offset = address - dynamic_begin;
  else if (behind_static)
    place.offset -= MAX_DYNAMIC_SHARED;
  auto& shadow = dynamic ? dynamic_shadow : static_shadow;
  bytes = std::min(bytes, shadow.size() - place.offset);
  for (size_t i = 0; i < bytes; ++i, ++place.offset) check_byte(shadow[place.offset], kind, place);
}

Buffer* find_buffer(uintptr_t address, size_t bytes) {
  auto holds = [&](const Buffer& buffer) { return address >= buffer.begin && address + bytes <= buffer.end; };
  if (last_buffer < buffers.size() && holds(buffers[last_buffer])) return &buffers[last_buffer];
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (!holds(buffers[i])) continue;
    last_buffer = i;
    return &buffers[i];
  }
  return nullptr;
}

// How many of the bytes this block touches for the first time.
uint64_t stamp(std::vector<unsigned>& stamps, size_t offset, size_t bytes) {
  const unsigned block = (running.moment.thread >> BLOCK_BITS) + 1;
  uint64_t fresh = 0;
  for (size_t i = offset; i < offset + bytes; ++i) {
    fresh += stamps[i] != block;
    stamps[i] = block;
  }
  return fresh;
}

void global_access(Buffer& buffer, uintptr_t address, size_t bytes, AccessKind kind,
                   uintptr_t return_address) {
  const size_t offset = address - buffer.begin;
  if (kind != WRITE) {
    buffer.traffic.read += bytes;
    buffer.traffic.read_per_block += stamp(buffer.read_stamp, offset, bytes);
  }
  if (kind != READ) {
    buffer.traffic.written += bytes;
    buffer.traffic.written_per_block += stamp(buffer.written_stamp, offset, bytes);
  }
  if (mode != CHECK) return;
  if (kind != READ && buffer.read_only) report_access("write-to-const", return_address, ", " + buffer.name);
  Place place{"global", &buffer.name, offset, return_address};
  for (size_t i = 0; i < bytes; ++i, ++place.offset) check_byte(buffer.shadow[place.offset], kind, place);
}

}  // namespace

void memory_begin_launch(size_t dynamic_shared_bytes) {
  *(volatile unsigned char*)smem_raw = 0;  // makes this thread's thread-local block
  dl_iterate_phdr(find_own_image, (void*)&memory_begin_launch);
  dynamic_begin = (uintptr_t)smem_raw;
  dynamic_end = dynamic_begin + dynamic_shared_bytes;
  shared_traffic = SharedTraffic();
  barriers = 0;
  reported.clear();
}

// 0xff in every byte is NaN in every floating-point format.
void memory_begin_block() {
  const uintptr_t dynamic_limit = dynamic_begin + MAX_DYNAMIC_SHARED;
  memset((void*)shared_begin, 0xff, dynamic_begin - shared_begin);
  memset((void*)dynamic_begin, 0xff, dynamic_end - dynamic_begin);
  memset((void*)dynamic_limit, 0xff, shared_end - dynamic_limit);
  if (mode != CHECK) return;
  static_shadow.assign(shared_end - shared_begin - MAX_DYNAMIC_SHARED, Shadow());
  dynamic_shadow.assign(dynamic_end - dynamic_begin, Shadow());
}

void memory_count_barrier() { ++barriers; }

}  // namespace ccpu

using namespace ccpu;

extern "C" {

// ---- called by cuda_executor.py ----
void ccpu_clear_buffers() { buffers.clear(); }

void ccpu_add_buffer(uintptr_t begin, size_t bytes, int read_only, const char* name, int with_shadow) {
  Buffer buffer{begin, begin + bytes, read_only != 0, name, {}, {}, {}, {}};
  buffer.read_stamp.resize(bytes);
  buffer.written_stamp.resize(bytes);
  if (with_shadow) buffer.shadow.resize(bytes);
  buffers.push_back(std::move(buffer));
}

// g++ guards thread_local arrays of classes that have a constructor; the guard is no part of shared memory.
void ccpu_add_guard(uintptr_t offset) { initialisation_guards.push_back(offset); }

void ccpu_traffic(uint64_t figures[3]) {
  figures[0] = shared_traffic.accesses;
  figures[1] = shared_traffic.bytes;
  figures[2] = barriers;
}

void ccpu_buffer_traffic(int index, uint64_t figures[4]) {
  const GlobalTraffic& traffic = buffers[index].traffic;
  figures[0] = traffic.read;
  figures[1] = traffic.written;
  figures[2] = traffic.read_per_block;
  figures[3] = traffic.written_per_block;
}

// ---- called by the code that g++ makes ----
void ccpu_access(const void* pointer, size_t bytes, AccessKind kind, void* program_counter) {
  if (!running.inside_kernel || mode == PLAIN) return;
  const uintptr_t address = (uintptr_t)pointer, return_address = (uintptr_t)program_counter;
  if (address >= running.stack_begin && address < running.stack_end) return;  // the thread's own variables
  if (address >= shared_begin && address < shared_end)
    shared_access(address, bytes, kind, return_address);
  else if (Buffer* buffer = find_buffer(address, bytes))
    global_access(*buffer, address, bytes, kind, return_address);
  else if (mode == CHECK && !in_image(address))  // which holds __constant__, threadIdx, tables
    refuse(address, kind, return_address);
}

#define HERE __builtin_return_address(0)
#define HOOKS(N)                                                            \
  void __tsan_read##N(void* p) { ccpu_access(p, N, READ, HERE); }           \
  void __tsan_write##N(void* p) { ccpu_access(p, N, WRITE, HERE); }         \
  void __tsan_unaligned_read##N(void* p) { ccpu_access(p, N, READ, HERE); } \
  void __tsan_unaligned_write##N(void* p) { ccpu_access(p, N, WRITE, HERE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, unsigned long n) { ccpu_access(p, n, READ, HERE); }
void __tsan_write_range(void* p, unsigned long n) { ccpu_access(p, n, WRITE, HERE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// -fsanitize=alignment calls this one, with the beginning of its description of the place
struct MisalignedPlace {
  const char* file;
  unsigned line, column;
};
void __ubsan_handle_type_mismatch_v1(MisalignedPlace* place, uintptr_t address) {
  if (!running.inside_kernel) return;
  report("misaligned", 0,
         describe_running_thread() + " at " + place->file + ":" + std::to_string(place->line) +
             ", the address is " + std::to_string(address % 64) + " modulo 64");
  stop_launch();  // the CPU would refuse the access too
}
}
