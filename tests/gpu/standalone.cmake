# The kernels' tests for a GPU, see CMakeLists.txt.
get_filename_component(root ../.. ABSOLUTE BASE_DIR ${CMAKE_CURRENT_LIST_DIR})
# What Larder's own modules and folders go by.
set(PROJECT_SOURCE_DIR ${root})
list(APPEND CMAKE_MODULE_PATH ${root}/cmake)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
include(LarderLayers)
include(LarderCuda)
if(NOT LARDER_CUDA)
  message(FATAL_ERROR "no nvcc: put it on the PATH or name it by CUDACXX")
endif()

enable_testing()
add_subdirectory(${root}/kernels/cuda kernels/cuda)
add_library(larder_gpu_reference STATIC ${root}/tests/kernels/reference.cc)
larder_include_root(larder_gpu_reference PUBLIC tests/gpu)
larder_include_root(larder_gpu_reference PUBLIC tests/kernels)
larder_include_root(larder_gpu_reference PUBLIC kernels)
target_compile_options(larder_gpu_reference PRIVATE ${LARDER_WARNINGS})

function(larder_gpu_program name)
  add_executable(gpu_${name} ${name}.cu)
  target_link_libraries(gpu_${name} PRIVATE larder_kernels_cuda larder_gpu_reference)
  target_compile_options(gpu_${name} PRIVATE
    # GCC 12 takes "text" + std::string for an overlapping copy.
    "${LARDER_CUDA_CODE};-O3;-lineinfo;--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wno-restrict")
endfunction()

foreach(test ${gpu_tests})
  larder_gpu_program(${test})
  add_test(NAME gpu_${test} COMMAND gpu_${test})
endforeach()
larder_gpu_program(bench)

# The GPU tier's own programs.
include(storage.cmake)
add_test(NAME gpu_storage_check COMMAND gpu_storage_check)
