# The GPU tier's programs. C++'s standard library, and the driver that is found at run time, are all
# they need, so the same files build on a machine that has a GPU and nothing of Larder's libraries.
get_filename_component(larder_root ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
find_package(Threads REQUIRED)
foreach(program storage_check storage_bandwidth)
  add_executable(gpu_${program}
    ${larder_root}/tests/gpu/${program}.cc
    ${larder_root}/storage/cuda_copy_engine.cc
    ${larder_root}/storage/cuda_device.cc
    ${larder_root}/storage/cuda_driver.cc)
  target_include_directories(gpu_${program} PRIVATE ${larder_root})
  target_compile_features(gpu_${program} PRIVATE cxx_std_20)
  target_link_libraries(gpu_${program} PRIVATE Threads::Threads ${CMAKE_DL_LIBS})
  target_compile_options(gpu_${program} PRIVATE -Wall -Wextra
    # The driver's functions are called by our own declarations of them.
    $<$<CXX_COMPILER_ID:Clang>:-fno-sanitize=function>)
endforeach()
