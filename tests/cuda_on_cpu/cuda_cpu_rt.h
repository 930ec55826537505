// What the two halves of the runtime share: cuda_cpu_rt.cpp runs the threads, cuda_cpu_memory.cpp watches
// their accesses.
#pragma once
#include <string>

#include "cuda_cpu.h"

namespace ccpu {

constexpr size_t MAX_DYNAMIC_SHARED = 232448;  // 227 KiB, as on sm_90
constexpr int WARP_BITS = 5;                   // 32 threads a warp
constexpr int BLOCK_BITS = 10;                 // at most 1024 threads a block
constexpr int MAX_BLOCKS = 1 << (31 - BLOCK_BITS);

enum Mode { PLAIN, COUNT, CHECK };  // as cuda_executor.py numbers them

// Who is running, and between which barriers. Only meetings of the whole block or the whole warp begin a new
// epoch.
struct Moment {
  unsigned thread;  // block number << BLOCK_BITS | thread in the block: unique in the launch
  unsigned block_epoch, warp_epoch;
};

// The running fiber, set by the scheduler before it resumes one.
struct Running {
  bool inside_kernel = false;
  Moment moment;
  uintptr_t stack_begin, stack_end;
};
extern Running running;
extern Mode mode;

// ---- reports (cuda_cpu_rt.cpp) ----
// A fault found at a program counter of the kernel, or at none (0) when the text says where.
void report(const char* kind, uintptr_t program_counter, const std::string& text);
[[noreturn]] void stop_launch();  // leaves the kernel at once
std::string describe_thread(unsigned thread);
std::string describe_running_thread();

// ---- memory (cuda_cpu_memory.cpp) ----
void memory_begin_launch(size_t dynamic_shared_bytes);
void memory_begin_block();  // poisons shared memory
void memory_count_barrier();

}  // namespace ccpu
