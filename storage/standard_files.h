// For the file of main: no descriptor of 0 to 2 stays closed, even where the process was started
// so. Otherwise the next file that is opened, an arena or the NVME tier's slots, would be one of
// them, and what is printed or logged would be written into it.
#pragma once

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace larder {

// Opens /dev/null the wrong way round, so that printing to what was closed stays an error.
// By bare system calls, because it runs before everything else.
inline void OccupyStandardFiles() {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd) {
    if (::syscall(SYS_fcntl, fd, F_GETFD) >= 0) continue;
    const int mode = fd == STDIN_FILENO ? O_WRONLY : O_RDONLY;
    if (::syscall(SYS_openat, AT_FDCWD, "/dev/null", mode) != fd) ::_exit(1);
  }
}

// Before the constructors of shared libraries: gRPC's opens an eventfd and leaves it open.
[[gnu::section(".preinit_array"), gnu::used]] static void (*before_main)() = OccupyStandardFiles;

}  // namespace larder
