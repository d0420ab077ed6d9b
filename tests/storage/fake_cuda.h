// FakeCuda: a libcuda.so.1 that plays devices on a machine without one.
//
// A shared library with the driver's functions that CudaDriver finds, so what is tested is what
// runs: larderd and its workers load it instead of NVIDIA's, by LD_LIBRARY_PATH or because a test
// is linked with it. It plays the properties that code gets wrong:
//
//   - a device address is no address of the host: touching it is SIGSEGV
//   - memory is NaN until it is written
//   - memory travels to other processes by handle, and only to others; what it maps is at another
//     address there; a handle of a process that is gone opens nothing; what is open stays
//     allocated until it is closed, however dead the process that allocated it
//   - a stream is a thread: copies are asynchronous, and between streams in no order
//   - an error of a copy stays: every later call of that context fails
//   - what is not in an allocation, freed, or without a current context, is refused
//
// Settings come from the environment when a process first calls, and from FakeCudaSet later:
//
//   FAKE_CUDA="devices=2 bytes=67108864 cuInit=803 cuMemHostRegister=801"
//
// A function's name and a number: it fails with that number from now on (0: no more). `copy` is the
// execution of a copy, whose failure is sticky; `hold=1` makes streams stand still. With
// `touchable=1` a device address is one of the host after all: for kernels of the emulated GPU
// (tests/gpu/emulation), which the CPU runs. Processes with the same `machine`, not 0, share the
// memory of its devices, so that one finds taken what others hold; otherwise each has its own.
//
// Thread safety: thread-safe.
#pragma once

extern "C" {

struct FakeCudaCounts {
  int contexts;       // retained
  int allocations;    // of this process
  int imports;        // handles open, and how often
  int registrations;  // of host memory
  int streams;
  int events;
  long memory_queries;   // of how much is free
  long asked;            // copies that were handed to a stream
  long copies;           // done
  long pageable_copies;  // of these from or to host memory that is not registered
};

FakeCudaCounts FakeCudaCount();
void FakeCudaSet(const char* settings);
// As in a new process: nothing is held, no error stays, settings are those of the environment.
void FakeCudaReset();

}  // extern "C"
