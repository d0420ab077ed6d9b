// A call that can be left in the middle and taken up again: what a CUDA thread is run as.
//
// Thread safety: none; all fibers of a process belong to one thread.
//
// 1. Resume runs the body until it yields or returns; Yield goes back to whoever resumed.
// 2. A fiber may be abandoned in the middle of its body only by Start or destruction, which run no
//    destructors of what lies on its stack.
// 3. A guard page lies below each stack: an overrun faults.
#pragma once

#include <cstddef>

namespace larder::emulation {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next Resume calls body(context) from its beginning.
  void Start(void (*body)(void*), void* context);
  void Resume();
  static void Yield();  // only inside a body

 private:
  static void Enter();

  std::byte* stack_;       // lowest usable byte
  void* saved_ = nullptr;  // stack pointer (x86-64) or ucontext_t, of a fiber that is left
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
};

}  // namespace larder::emulation
