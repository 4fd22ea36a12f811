// Fibers for the SIMT emulation: a stack of its own for each emulated GPU thread, and a switch between it and the
// scheduler.
//
// A kernel step is a few dozen instructions, so the switch is what a run costs: swapcontext makes a system call each
// time, and a run takes 0.65 us a step; with the hand-written switches below it takes 0.14. Other machines than x86-64
// and aarch64 fall back to ucontext. AddressSanitizer has to be told of every switch, or it mixes up stacks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
// Saves what the calling convention makes the callee keep, swaps stacks, restores.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#elif defined(__aarch64__) && !defined(SIMT_UCONTEXT)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,%function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch,.-simt_switch
)");
#else
#define SIMT_UCONTEXT 1
#include <ucontext.h>
#endif

namespace tpfuse::simt {

// A stack with an inaccessible page below it, so that an overflow stops at once. Stacks are kept for the next fiber:
// mapping one costs far more than running a small kernel on it.
class Stack {
 public:
  static constexpr size_t kBytes = 64 << 10;

  Stack() {
    if (!pool().empty()) {
      low_ = pool().back();
      pool().pop_back();
    } else {
      low_ = map();
    }
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(low_, kBytes);  // an abandoned fiber leaves its frames poisoned
#endif
  }
  ~Stack() { pool().push_back(low_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* low() const { return low_; }
  char* high() const { return low_ + kBytes; }

 private:
  static std::vector<char*>& pool() {
    static std::vector<char*> free_stacks;
    return free_stacks;
  }
  static char* map() {
    size_t guard = size_t(sysconf(_SC_PAGESIZE));
    void* p = mmap(nullptr, kBytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, guard, PROT_NONE) != 0) {
      std::perror("simt: no memory for a fiber's stack");
      std::abort();
    }
    return static_cast<char*>(p) + guard;
  }

  char* low_;
};

// Runs `entry(argument)` on its own stack, from `resume` to the next `suspend` or `finish`. There is one scheduler, on
// the stack that calls `resume`; fibers never switch to each other.
class Fiber {
 public:
  void start(void (*entry)(void*), void* argument) {
    entry_ = entry;
    argument_ = argument;
#if defined(SIMT_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.low();
    context_.uc_stack.ss_size = Stack::kBytes;
    makecontext(&context_, &Fiber::enter, 0);
#else
    void** top = reinterpret_cast<void**>(stack_.high());
#if defined(__x86_64__)
    top[-2] = reinterpret_cast<void*>(&Fiber::enter);  // popped by ret, which leaves the alignment of a call
    top[-1] = nullptr;
    saved_ = top - 8;
#else
    saved_ = top - 20;
    static_cast<void**>(saved_)[11] = reinterpret_cast<void*>(&Fiber::enter);  // x30
#endif
#endif
  }

  void resume() {
    running() = this;
    to_fiber();
  }
  void suspend() { to_scheduler(false); }
  [[noreturn]] void finish() {
    to_scheduler(true);
    std::abort();
  }

 private:
  static Fiber*& running() {
    static Fiber* fiber;
    return fiber;
  }
  static void enter() {
    Fiber* self = running();
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &self->scheduler_low_, &self->scheduler_bytes_);
#endif
    self->entry_(self->argument_);
    self->finish();
  }

  void to_fiber() {
#if defined(SIMT_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.low(), Stack::kBytes);
#endif
#if defined(SIMT_UCONTEXT)
    swapcontext(&scheduler(), &context_);
#else
    simt_switch(&scheduler(), saved_);
#endif
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void to_scheduler([[maybe_unused]] bool forever) {
#if defined(SIMT_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(forever ? nullptr : &fake, scheduler_low_, scheduler_bytes_);
#endif
#if defined(SIMT_UCONTEXT)
    swapcontext(&context_, &scheduler());
#else
    simt_switch(&saved_, scheduler());
#endif
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake, &scheduler_low_, &scheduler_bytes_);
#endif
  }

#if defined(SIMT_UCONTEXT)
  static ucontext_t& scheduler() {
    static ucontext_t context;
    return context;
  }
  ucontext_t context_;
#else
  static void*& scheduler() {
    static void* saved;
    return saved;
  }
  void* saved_ = nullptr;
#endif
#if defined(SIMT_ASAN)
  const void* scheduler_low_ = nullptr;
  size_t scheduler_bytes_ = 0;
#endif
  Stack stack_;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace tpfuse::simt
