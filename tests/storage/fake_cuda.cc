#include "tests/storage/fake_cuda.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

// Outside of the namespace below: a parameter of functions that are exported.
struct FakeCudaHandle {
  uint64_t magic = 0x4350'4955'4441'4b46;
  int64_t pid = 0;
  int64_t fd = 0;
  uint64_t bytes = 0;
  int64_t device = 0;
  char rest[24] = {};
};
static_assert(sizeof(FakeCudaHandle) == 64);

namespace {

using Handle = FakeCudaHandle;
using Pointer = unsigned long long;

enum : int {
  kOk = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
  kIllegalAddress = 700,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
};

constexpr uint64_t kGranule = 2 << 20;
// Not canonical on x86-64, so that nobody can touch it by mistake.
constexpr Pointer kBase = 0x00f0'0000'0000'0000;

struct Memory {
  Memory(int fd_, size_t bytes_, int device_) : fd(fd_), bytes(bytes_), device(device_) {
    host = static_cast<char*>(
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0));
  }
  ~Memory() {
    ::munmap(host, bytes);
    ::close(fd);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const int fd;
  const size_t bytes;
  const int device;
  char* host = nullptr;
  int opened = 0;      // by handle, how often; 0: allocated here
  std::string handle;  // of an opened one
};

// As the kernel names the descriptors that have it; memory of a `machine` is found by it.
std::string NameOf(long machine, int device) {
  return "fake-cuda-" + std::to_string(machine) + "-" + std::to_string(device);
}

// What any process has open of it, each once: its owner, who opened a handle, or both.
size_t HeldBy(long machine, int device) {
  const std::string wanted = "/memfd:" + NameOf(machine, device) + " (deleted)";
  std::map<ino_t, size_t> held;
  glob_t found = {};
  if (::glob("/proc/[0-9]*/fd/*", GLOB_NOSORT, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) {
      char target[64] = "";
      struct stat file = {};
      if (::readlink(found.gl_pathv[i], target, sizeof(target) - 1) > 0 && wanted == target &&
          ::stat(found.gl_pathv[i], &file) == 0) {
        held[file.st_ino] = static_cast<size_t>(file.st_size);
      }
    }
  }
  ::globfree(&found);
  size_t bytes = 0;
  for (const auto& [inode, size] : held) bytes += size;
  return bytes;
}

struct Stream {
  int device = 0;
  std::deque<std::function<void()>> work;
  bool closing = false;
};

struct Event {
  int device = 0;
  uint64_t recorded = 0;
  uint64_t done = 0;
};

}  // namespace

struct CUctx_st {
  int device = 0;
  int retained = 0;
  int sticky = 0;
};
struct CUstream_st {
  std::shared_ptr<Stream> stream;
};
struct CUevent_st {
  std::shared_ptr<Event> event;
};

namespace {

// Everything of the process, under one mutex; copies are made outside of it.
class Fake {
 public:
  Fake() { Reset(); }

  // Returns when no copy of before touches anybody's memory any more.
  void Reset() {
    std::unique_lock lock(mu);
    ++generation;
    changed.wait(lock, [this] { return copying == 0; });
    settings.clear();
    const char* const text = std::getenv("FAKE_CUDA");
    Parse(text == nullptr ? "" : text);
    contexts.assign(contexts.size(), {});
    memories.clear();
    registered.clear();
    streams = events = 0;
    memory_queries = asked = copies = pageable_copies = 0;
    changed.notify_all();
  }
  void Parse(const std::string& text) {
    std::istringstream words(text);
    for (std::string word; words >> word;) {
      const size_t at = word.find('=');
      if (at != std::string::npos) settings[word.substr(0, at)] = std::atol(&word[at + 1]);
    }
  }
  long Get(const std::string& name, long standard) const {
    const auto it = settings.find(name);
    return it == settings.end() ? standard : it->second;
  }
  int Devices() const { return static_cast<int>(Get("devices", 1)); }

  // The allocation that has all of it; null: none has.
  std::shared_ptr<Memory> Find(Pointer pointer, size_t bytes, size_t* offset) const {
    auto it = memories.upper_bound(pointer);
    if (it == memories.begin()) return nullptr;
    --it;
    *offset = pointer - it->first;
    const Memory& memory = *it->second;
    if (*offset > memory.bytes || bytes > memory.bytes - *offset) return nullptr;
    return it->second;
  }
  Pointer Place(const std::shared_ptr<Memory>& memory) {
    Pointer at = next;
    next += (memory->bytes + kGranule - 1) / kGranule * kGranule + kGranule;  // a gap behind
    if (Get("touchable", 0) != 0) at = reinterpret_cast<Pointer>(memory->host);
    memories[at] = memory;
    return at;
  }
  bool Registered(const char* host, size_t bytes) const {
    auto it = registered.upper_bound(host);
    if (it == registered.begin()) return false;
    --it;
    return host + bytes <= it->first + it->second;
  }
  // Bytes of the device that are taken: of this process, or of all on its `machine`.
  size_t Used(int device) const {
    if (const long machine = Get("machine", 0); machine != 0) return HeldBy(machine, device);
    size_t used = 0;
    for (const auto& [at, memory] : memories) {
      if (memory->device == device && memory->opened == 0) used += memory->bytes;
    }
    return used;
  }

  std::mutex mu;
  std::condition_variable changed;
  std::map<std::string, long> settings;
  bool initialized = false;
  std::vector<CUctx_st> contexts = std::vector<CUctx_st>(16);  // never moved
  std::map<Pointer, std::shared_ptr<Memory>> memories;
  // Elsewhere in each process, as with the real one.
  Pointer next = kBase + (static_cast<Pointer>(::getpid()) % 4096) * (uint64_t{1} << 34);
  std::map<const char*, size_t> registered;
  int streams = 0;
  int events = 0;
  // Streams and events that exist. A caller that abandons a device leaves them to the driver, so
  // they are no leak.
  std::set<const void*> handles;
  uint64_t generation = 0;  // of resets: what a stream had queued before one is not done any more
  int copying = 0;
  long memory_queries = 0;
  long asked = 0;
  long copies = 0;
  long pageable_copies = 0;
};

Fake& TheFake() {
  static Fake* const fake = new Fake;  // its threads may outlive main
  return *fake;
}

thread_local std::vector<CUctx_st*> t_current;

// One call: locked, and refused where it must be.
struct Call {
  explicit Call(const char* name, bool context = true) : fake(TheFake()), lock(fake.mu) {
    code = static_cast<int>(fake.Get(name, 0));
    if (code != 0) return;
    if (!fake.initialized && std::string(name) != "cuInit") {
      code = kNotInitialized;
    } else if (context && t_current.empty()) {
      code = kInvalidContext;
    } else if (context) {
      code = t_current.back()->sticky;
    }
  }
  int device() const { return t_current.back()->device; }

  Fake& fake;
  std::unique_lock<std::mutex> lock;
  int code = 0;
};

void RunStream(const std::shared_ptr<Stream>& stream) {
  Fake& fake = TheFake();
  std::unique_lock lock(fake.mu);
  while (true) {
    while (stream->work.empty() || fake.Get("hold", 0) != 0) {
      if (stream->closing && stream->work.empty()) return;
      fake.changed.wait(lock);
    }
    const std::function<void()> next = std::move(stream->work.front());
    stream->work.pop_front();
    lock.unlock();
    next();
    lock.lock();
  }
}

int EnqueueCopy(Call& call, bool up, Pointer device, char* host, size_t bytes, CUstream_st* on) {
  size_t offset = 0;
  if (on == nullptr || call.fake.Find(device, bytes, &offset) == nullptr) return kInvalidValue;
  on->stream->work.push_back(
      [up, device, host, bytes, gpu = on->stream->device, generation = call.fake.generation] {
        Fake& fake = TheFake();
        std::shared_ptr<Memory> memory;
        size_t at = 0;
        {
          const std::lock_guard lock(fake.mu);
          if (generation != fake.generation) return;
          CUctx_st& context = fake.contexts[gpu];
          memory = fake.Find(device, bytes, &at);
          if (context.sticky == 0) context.sticky = static_cast<int>(fake.Get("copy", 0));
          if (context.sticky == 0 && memory == nullptr) context.sticky = kIllegalAddress;
          if (context.sticky != 0) return;
          ++fake.copying;
          ++fake.copies;
          fake.pageable_copies += !fake.Registered(host, bytes);
        }
        std::memcpy(up ? memory->host + at : host, up ? host : memory->host + at, bytes);
        const std::lock_guard lock(fake.mu);
        --fake.copying;
        fake.changed.notify_all();
      });
  ++call.fake.asked;
  call.fake.changed.notify_all();
  return kOk;
}

}  // namespace

extern "C" {

FakeCudaCounts FakeCudaCount() {
  Fake& fake = TheFake();
  const std::lock_guard lock(fake.mu);
  FakeCudaCounts counts = {};
  for (const CUctx_st& context : fake.contexts) counts.contexts += context.retained;
  for (const auto& [at, memory] : fake.memories) {
    counts.allocations += memory->opened == 0;
    counts.imports += memory->opened;
  }
  counts.registrations = static_cast<int>(fake.registered.size());
  counts.streams = fake.streams;
  counts.events = fake.events;
  counts.memory_queries = fake.memory_queries;
  counts.asked = fake.asked;
  counts.copies = fake.copies;
  counts.pageable_copies = fake.pageable_copies;
  return counts;
}

void FakeCudaSet(const char* settings) {
  Fake& fake = TheFake();
  const std::lock_guard lock(fake.mu);
  fake.Parse(settings);
  fake.changed.notify_all();
}

void FakeCudaReset() { TheFake().Reset(); }

int cuInit(unsigned flags) {
  Call call("cuInit", false);
  if (call.code != 0) return call.code;
  if (flags != 0) return kInvalidValue;
  if (call.fake.Devices() == 0) return kNoDevice;
  call.fake.initialized = true;
  return kOk;
}

int cuGetErrorString(int error, const char** text) {
  static const std::map<int, const char*> kTexts = {
      {kInvalidValue, "invalid argument"},
      {kOutOfMemory, "out of memory"},
      {kNoDevice, "no CUDA-capable device is detected"},
      {kInvalidContext, "invalid device context"},
      {214, "uncorrectable ECC error encountered"},
      {kIllegalAddress, "an illegal memory access was encountered"},
      {803, "system has unsupported display driver / cuda driver combination"},
      {999, "unknown error"},
  };
  const auto it = kTexts.find(error);
  *text = it == kTexts.end() ? "another error" : it->second;
  return kOk;
}

int cuDeviceGetCount(int* count) {
  Call call("cuDeviceGetCount", false);
  if (call.code == 0) *count = call.fake.Devices();
  return call.code;
}

int cuDeviceGet(int* device, int ordinal) {
  Call call("cuDeviceGet", false);
  if (call.code != 0) return call.code;
  if (ordinal < 0 || ordinal >= call.fake.Devices()) return kInvalidDevice;
  *device = ordinal;
  return kOk;
}

int cuDeviceGetName(char* name, int length, int device) {
  Call call("cuDeviceGetName", false);
  if (call.code != 0) return call.code;
  std::snprintf(name, static_cast<size_t>(length), "Fake %d", device);
  return kOk;
}

int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
  Call call("cuDeviceGetUuid", false);
  if (call.code != 0) return call.code;
  for (int i = 0; i < 16; ++i) uuid[i] = static_cast<unsigned char>(i * 16 + device);
  return kOk;
}

int cuDevicePrimaryCtxRetain(CUctx_st** context, int device) {
  Call call("cuDevicePrimaryCtxRetain", false);
  if (call.code != 0) return call.code;
  if (device < 0 || device >= call.fake.Devices()) return kInvalidDevice;
  *context = &call.fake.contexts[device];
  (*context)->device = device;
  (*context)->retained += 1;
  return kOk;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  Call call("cuDevicePrimaryCtxRelease", false);
  if (call.code != 0) return call.code;
  if (call.fake.contexts[device].retained == 0) return kInvalidContext;
  call.fake.contexts[device].retained -= 1;
  return kOk;
}

int cuCtxPushCurrent_v2(CUctx_st* context) {
  Call call("cuCtxPushCurrent", false);
  if (call.code != 0) return call.code;
  if (context == nullptr || context->retained == 0) return kInvalidContext;
  t_current.push_back(context);
  return kOk;
}

int cuCtxPopCurrent_v2(CUctx_st** context) {
  if (t_current.empty()) return kInvalidContext;
  *context = t_current.back();
  t_current.pop_back();
  return kOk;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
  Call call("cuMemGetInfo");
  if (call.code != 0) return call.code;
  ++call.fake.memory_queries;
  *total = static_cast<size_t>(call.fake.Get("bytes", 1 << 30));
  *free = *total - call.fake.Used(call.device());
  return kOk;
}

int cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
  Call call("cuMemAlloc");
  if (call.code != 0) return call.code;
  if (bytes == 0) return kInvalidValue;
  const auto total = static_cast<size_t>(call.fake.Get("bytes", 1 << 30));
  if (bytes > total - call.fake.Used(call.device())) return kOutOfMemory;
  const std::string name = NameOf(call.fake.Get("machine", 0), call.device());
  const int fd = ::memfd_create(name.c_str(), MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return kOutOfMemory;
  auto memory = std::make_shared<Memory>(fd, bytes, call.device());
  std::memset(memory->host, 0xff, bytes);
  *pointer = call.fake.Place(memory);
  return kOk;
}

int cuMemFree_v2(Pointer pointer) {
  Call call("cuMemFree");
  if (call.code != 0) return call.code;
  const auto it = call.fake.memories.find(pointer);
  if (it == call.fake.memories.end() || it->second->opened != 0) return kInvalidValue;
  call.fake.memories.erase(it);
  return kOk;
}

int cuIpcGetMemHandle(Handle* handle, Pointer pointer) {
  Call call("cuIpcGetMemHandle");
  if (call.code != 0) return call.code;
  const auto it = call.fake.memories.find(pointer);
  if (it == call.fake.memories.end() || it->second->opened != 0) return kInvalidValue;
  *handle = Handle{};
  handle->pid = ::getpid();
  handle->fd = it->second->fd;
  handle->bytes = it->second->bytes;
  handle->device = it->second->device;
  return kOk;
}

int cuIpcOpenMemHandle_v2(Pointer* pointer, Handle handle, unsigned flags) {
  Call call("cuIpcOpenMemHandle");
  if (call.code != 0) return call.code;
  if (flags != 1) return kInvalidValue;
  if (handle.magic != Handle{}.magic || handle.device != call.device()) return kInvalidHandle;
  if (handle.pid == ::getpid()) return kInvalidContext;
  const std::string key(reinterpret_cast<const char*>(&handle), sizeof(handle));
  for (const auto& [at, memory] : call.fake.memories) {
    if (memory->handle != key) continue;
    memory->opened += 1;
    *pointer = at;
    return kOk;
  }
  const std::string path =
      "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.fd);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return kInvalidHandle;
  auto memory = std::make_shared<Memory>(fd, handle.bytes, call.device());
  memory->opened = 1;
  memory->handle = key;
  *pointer = call.fake.Place(memory);
  return kOk;
}

int cuIpcCloseMemHandle(Pointer pointer) {
  Call call("cuIpcCloseMemHandle");
  if (call.code != 0) return call.code;
  const auto it = call.fake.memories.find(pointer);
  if (it == call.fake.memories.end() || it->second->opened == 0) return kInvalidValue;
  if (--it->second->opened == 0) call.fake.memories.erase(it);
  return kOk;
}

int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned flags) {
  Call call("cuMemHostRegister");
  if (call.code != 0) return call.code;
  const char* const from = static_cast<const char*>(memory);
  if (bytes == 0 || flags > 0xf || reinterpret_cast<uintptr_t>(memory) % 4096 != 0) {
    return kInvalidValue;
  }
  for (const auto& [at, length] : call.fake.registered) {
    if (from < at + length && at < from + bytes) return kAlreadyRegistered;
  }
  call.fake.registered[from] = bytes;
  return kOk;
}

int cuMemHostUnregister(void* memory) {
  Call call("cuMemHostUnregister");
  if (call.code != 0) return call.code;
  const bool known = call.fake.registered.erase(static_cast<const char*>(memory)) > 0;
  return known ? kOk : kNotRegistered;
}

int cuStreamCreate(CUstream_st** stream, unsigned flags) {
  Call call("cuStreamCreate");
  if (call.code != 0) return call.code;
  if (flags > 1) return kInvalidValue;
  *stream = new CUstream_st{std::make_shared<Stream>()};
  (*stream)->stream->device = call.device();
  std::thread(RunStream, (*stream)->stream).detach();
  call.fake.streams += 1;
  call.fake.handles.insert(*stream);
  return kOk;
}

// As the real one: what is queued goes on.
int cuStreamDestroy_v2(CUstream_st* stream) {
  Call call("cuStreamDestroy", false);
  if (call.code != 0) return call.code;
  stream->stream->closing = true;
  call.fake.changed.notify_all();
  call.fake.streams -= 1;
  call.fake.handles.erase(stream);
  delete stream;
  return kOk;
}

int cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, CUstream_st* stream) {
  Call call("cuMemcpyHtoDAsync");
  if (call.code != 0) return call.code;
  return EnqueueCopy(call, true, to, const_cast<char*>(static_cast<const char*>(from)), bytes,
                     stream);
}

int cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, CUstream_st* stream) {
  Call call("cuMemcpyDtoHAsync");
  if (call.code != 0) return call.code;
  return EnqueueCopy(call, false, from, static_cast<char*>(to), bytes, stream);
}

int cuEventCreate(CUevent_st** event, unsigned flags) {
  Call call("cuEventCreate");
  if (call.code != 0) return call.code;
  if (flags > 7) return kInvalidValue;
  *event = new CUevent_st{std::make_shared<Event>()};
  (*event)->event->device = call.device();
  call.fake.events += 1;
  call.fake.handles.insert(*event);
  return kOk;
}

int cuEventDestroy_v2(CUevent_st* event) {
  Call call("cuEventDestroy", false);
  if (call.code != 0) return call.code;
  call.fake.events -= 1;
  call.fake.handles.erase(event);
  delete event;
  return kOk;
}

int cuEventRecord(CUevent_st* event, CUstream_st* stream) {
  Call call("cuEventRecord");
  if (call.code != 0) return call.code;
  if (stream == nullptr || event->event->device != stream->stream->device) return kInvalidHandle;
  const uint64_t number = ++event->event->recorded;
  stream->stream->work.push_back([on = event->event, number] {
    const std::lock_guard lock(TheFake().mu);
    on->done = number;
  });
  call.fake.changed.notify_all();
  return kOk;
}

int cuEventQuery(CUevent_st* event) {
  Call call("cuEventQuery");
  if (call.code != 0) return call.code;
  return event->event->done == event->event->recorded ? kOk : kNotReady;
}

}  // extern "C"
