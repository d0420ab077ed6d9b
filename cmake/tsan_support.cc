// What ThreadSanitizer cannot know of libraries that were built without it. Only in builds with
// -fsanitize=thread.
//
// absl::Mutex, CondVar, Notification: distributions ship Abseil without the sanitizer's
// annotations, and its locks wait with futexes of their own, so every field that one guards
// would be reported as a race. These definitions take the place of the shared library's: they
// call those and say what they order. Suppressing the reports would hide real races too.
//
// RocksDB's own lock-free reads are not instrumented either: calls of memcmp and the like that
// come straight out of its library are left out. Ours beside them are not.
//
// While a thread unlocks or waits it evaluates the Conditions of others under their lock, not
// its own; those reads are ignored.

#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

extern "C" {
const char* __tsan_default_suppressions() {
  return "called_from_lib:librocksdb.so\n"
         "called_from_lib:libabsl_status.so\n"  // counts references to a status's text
         "race:absl::debian3::Status::UnrefNonInlined\n"
         "race:rocksdb::\n";  // its headers' inline functions, called by its threads
}

void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}

namespace {

// The function of the same name in the library behind this one. A pointer to a member
// function that is not virtual begins with the function's address (Itanium C++ ABI).
template <typename MemberFn>
MemberFn Real(MemberFn ours) {
  void* words[sizeof(MemberFn) / sizeof(void*)];
  std::memcpy(words, &ours, sizeof(ours));
  Dl_info info{};
  void* found = nullptr;
  if (dladdr(words[0], &info) != 0 && info.dli_sname != nullptr) {
    found = dlsym(RTLD_NEXT, info.dli_sname);
  }
  if (found == nullptr) {
    std::fprintf(stderr, "tsan_support.cc: no %s; Abseil must be a shared library\n",
                 info.dli_sname ? info.dli_sname : "symbol");
    std::abort();
  }
  words[0] = found;
  std::memcpy(&ours, words, sizeof(ours));
  return ours;
}

void* Address(const void* p) { return const_cast<void*>(p); }

// Around a call that gives the lock up and may take it again.
class Released {
 public:
  explicit Released(const void* lock) : lock_(Address(lock)) {
    __tsan_release(lock_);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  }
  ~Released() {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    __tsan_acquire(lock_);
  }

 private:
  void* const lock_;
};

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static const auto real = Real(&Mutex::Lock);
  (this->*real)();
  __tsan_acquire(this);
}
bool Mutex::TryLock() {
  static const auto real = Real(&Mutex::TryLock);
  const bool taken = (this->*real)();
  if (taken) __tsan_acquire(this);
  return taken;
}
void Mutex::Unlock() {
  static const auto real = Real(&Mutex::Unlock);
  __tsan_release(this);
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  (this->*real)();
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
void Mutex::ReaderLock() {
  static const auto real = Real(&Mutex::ReaderLock);
  (this->*real)();
  __tsan_acquire(this);
}
void Mutex::ReaderUnlock() {
  static const auto real = Real(&Mutex::ReaderUnlock);
  __tsan_release(this);
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  (this->*real)();
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
void Mutex::Await(const Condition& condition) {
  static const auto real = Real(&Mutex::Await);
  Released released(this);
  (this->*real)(condition);
}
bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static const auto real = Real(&Mutex::AwaitWithTimeout);
  Released released(this);
  return (this->*real)(condition, timeout);
}
bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static const auto real = Real(&Mutex::AwaitWithDeadline);
  Released released(this);
  return (this->*real)(condition, deadline);
}
void Mutex::LockWhen(const Condition& condition) {
  static const auto real = Real(&Mutex::LockWhen);
  Released released(this);
  (this->*real)(condition);
}
bool Mutex::LockWhenWithTimeout(const Condition& condition, Duration timeout) {
  static const auto real = Real(&Mutex::LockWhenWithTimeout);
  Released released(this);
  return (this->*real)(condition, timeout);
}
bool Mutex::LockWhenWithDeadline(const Condition& condition, Time deadline) {
  static const auto real = Real(&Mutex::LockWhenWithDeadline);
  Released released(this);
  return (this->*real)(condition, deadline);
}

void CondVar::Wait(Mutex* mutex) {
  static const auto real = Real(&CondVar::Wait);
  Released released(mutex);
  (this->*real)(mutex);
}
bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static const auto real = Real(&CondVar::WaitWithTimeout);
  Released released(mutex);
  return (this->*real)(mutex, timeout);
}
bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static const auto real = Real(&CondVar::WaitWithDeadline);
  Released released(mutex);
  return (this->*real)(mutex, deadline);
}

void Notification::Notify() {
  static const auto real = Real(&Notification::Notify);
  __tsan_release(this);
  (this->*real)();
}
void Notification::WaitForNotification() const {
  static const auto real = Real(&Notification::WaitForNotification);
  (this->*real)();
  __tsan_acquire(Address(this));
}
bool Notification::WaitForNotificationWithTimeout(Duration timeout) const {
  static const auto real = Real(&Notification::WaitForNotificationWithTimeout);
  const bool notified = (this->*real)(timeout);
  if (notified) __tsan_acquire(Address(this));
  return notified;
}
bool Notification::WaitForNotificationWithDeadline(Time deadline) const {
  static const auto real = Real(&Notification::WaitForNotificationWithDeadline);
  const bool notified = (this->*real)(deadline);
  if (notified) __tsan_acquire(Address(this));
  return notified;
}

ABSL_NAMESPACE_END
}  // namespace absl
