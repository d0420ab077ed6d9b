# Finds nvcc, if there is one: LARDER_CUDA is then true and kernels/cuda is compiled for GPUs too.
# -DLARDER_CUDA_ENABLE=OFF leaves CUDA out where nvcc is.
option(LARDER_CUDA_ENABLE "Compile kernels/cuda with nvcc, if found" ON)
set(LARDER_CUDA OFF)
if(LARDER_CUDA_ENABLE AND NOT LARDER_SANITIZE)
  if(DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
  else()
    find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin /opt/cuda/bin)
  endif()
endif()
if(LARDER_CUDA_ENABLE AND NOT LARDER_SANITIZE AND CMAKE_CUDA_COMPILER)
  # Code for Ampere and Hopper, and for what comes later PTX that the driver compiles.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(LARDER_CUDA_CODE
    -gencode=arch=compute_80,code=sm_80
    -gencode=arch=compute_90a,code=sm_90a
    -gencode=arch=compute_90,code=compute_90)
  # CMake 3.25 does not know that nvcc has learned C++20.
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  enable_language(CUDA)
  set(LARDER_CUDA ON)
  message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}")
else()
  message(STATUS "CUDA: no nvcc; kernels/cuda is compiled for the emulator of tests/gpu only")
endif()
