# larder_layer(NAME FOLDER SOURCES... [HEADERS...] [LINKS TARGETS...] [PRIVATE_LINKS TARGETS...])
#
# One static library a folder. Its headers are reached as "FOLDER/name.h" through an include
# root that holds nothing but that folder, and only by the layers that link it: an include
# against the direction of dependencies does not compile. HEADERS: the headers that must compile
# alone, where the folder holds another target's as well; without it all of the folder.
set(LARDER_WARNINGS -Wall -Wextra)
if(LARDER_SANITIZE)
  add_compile_options(-fsanitize=${LARDER_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${LARDER_SANITIZE})
endif()
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  list(APPEND LARDER_WARNINGS -Wthread-safety -Werror=thread-safety)
endif()

function(larder_include_root target scope folder)
  set(root ${CMAKE_BINARY_DIR}/include-roots/${target})
  get_filename_component(parent ${folder} DIRECTORY)
  file(MAKE_DIRECTORY ${root}/${parent})
  file(CREATE_LINK ${PROJECT_SOURCE_DIR}/${folder} ${root}/${folder} SYMBOLIC)
  target_include_directories(${target} ${scope} ${root})
endfunction()

function(larder_layer name folder)
  cmake_parse_arguments(ARG "" "" "SOURCES;HEADERS;LINKS;PRIVATE_LINKS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  larder_include_root(${name} PUBLIC ${folder})
  target_link_libraries(${name} PUBLIC ${ARG_LINKS} PRIVATE ${ARG_PRIVATE_LINKS})
  target_compile_options(${name} PRIVATE ${LARDER_WARNINGS})

  # Every header compiles alone.
  set(headers ${ARG_HEADERS})
  if(NOT headers)
    file(GLOB headers RELATIVE ${PROJECT_SOURCE_DIR}/${folder} ${PROJECT_SOURCE_DIR}/${folder}/*.h)
  endif()
  set(checks)
  foreach(header ${headers})
    string(MAKE_C_IDENTIFIER ${header} id)
    set(check ${CMAKE_CURRENT_BINARY_DIR}/header_checks/${id}.cc)
    file(GENERATE OUTPUT ${check} CONTENT "#include \"${folder}/${header}\"\n")
    list(APPEND checks ${check})
  endforeach()
  if(checks)
    add_library(${name}_headers OBJECT EXCLUDE_FROM_ALL ${checks})
    target_link_libraries(${name}_headers PRIVATE ${name} ${ARG_PRIVATE_LINKS})
    target_compile_options(${name}_headers PRIVATE ${LARDER_WARNINGS})
    set_property(GLOBAL APPEND PROPERTY LARDER_HEADER_CHECKS ${name}_headers)
  endif()
endfunction()
