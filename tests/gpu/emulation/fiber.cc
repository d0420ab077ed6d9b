#include "tests/gpu/emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define LARDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LARDER_ASAN 1
#endif
#endif
#if defined(LARDER_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace larder::emulation {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kStackBytes = 252 * 1024;

Fiber* current = nullptr;

// AddressSanitizer wants to be told of stacks; otherwise these do nothing.
[[maybe_unused]] const void* outer_stack = nullptr;
[[maybe_unused]] size_t outer_stack_bytes = 0;

void LeaveFor([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack,
              [[maybe_unused]] size_t bytes) {
#if defined(LARDER_ASAN)
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}
void Arrived([[maybe_unused]] void* fake, [[maybe_unused]] bool inside) {
#if defined(LARDER_ASAN)
  __sanitizer_finish_switch_fiber(fake, inside ? &outer_stack : nullptr,
                                  inside ? &outer_stack_bytes : nullptr);
#endif
}

}  // namespace

#if defined(__x86_64__)

// swapcontext makes a system call each time; a block of 128 threads switches some thousand times a
// tile. Saves what the ABI has a callee keep, changes stacks, and returns on the other one.
extern "C" void larder_fiber_switch(void** from, void* to);
asm(R"(
.text
.globl larder_fiber_switch
.type larder_fiber_switch, @function
larder_fiber_switch:
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
.size larder_fiber_switch, .-larder_fiber_switch
)");

namespace {
void* outer = nullptr;
void* Prepare(std::byte* stack, void (*enter)(), void* /*saved*/) {
  auto* top = reinterpret_cast<uint64_t*>(stack + kStackBytes) - 1;
  *--top = reinterpret_cast<uint64_t>(enter);  // what ret pops; the stack is then 8 off a
                                               // multiple of 16, as after a call
  return top - 6;                              // six registers, whatever they hold
}
void Release(void* /*saved*/) {}
void SwitchIn(void** saved) { larder_fiber_switch(&outer, *saved); }
void SwitchOut(void** saved) { larder_fiber_switch(saved, outer); }
}  // namespace

#else

namespace {
ucontext_t outer;
void* Prepare(std::byte* stack, void (*enter)(), void* saved) {
  auto* context = saved != nullptr ? static_cast<ucontext_t*>(saved) : new ucontext_t;
  getcontext(context);
  context->uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = kStackBytes};
  context->uc_link = nullptr;
  makecontext(context, enter, 0);
  return context;
}
void Release(void* saved) { delete static_cast<ucontext_t*>(saved); }
void SwitchIn(void** saved) { swapcontext(&outer, static_cast<ucontext_t*>(*saved)); }
void SwitchOut(void** saved) { swapcontext(static_cast<ucontext_t*>(*saved), &outer); }
}  // namespace

#endif

Fiber::Fiber() {
  void* const map = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(map, kGuardBytes, PROT_NONE) != 0) {
    std::perror("emulation: stack of a fiber");
    std::abort();
  }
  stack_ = static_cast<std::byte*>(map) + kGuardBytes;
}

Fiber::~Fiber() {
  Release(saved_);
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::Start(void (*body)(void*), void* context) {
  body_ = body;
  context_ = context;
  saved_ = Prepare(stack_, &Fiber::Enter, saved_);
}

void Fiber::Enter() {
  Arrived(nullptr, true);
  current->body_(current->context_);
  for (;;) Yield();  // a body that has returned stays so until Start
}

void Fiber::Resume() {
  current = this;
  void* fake = nullptr;
  LeaveFor(&fake, stack_, kStackBytes);
  SwitchIn(&saved_);
  Arrived(fake, false);
}

void Fiber::Yield() {
  Fiber* const self = current;
  void* fake = nullptr;
  LeaveFor(&fake, outer_stack, outer_stack_bytes);
  SwitchOut(&self->saved_);
  Arrived(fake, true);
}

}  // namespace larder::emulation
