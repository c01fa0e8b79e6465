# SPDX-License-Identifier: Apache-2.0
# Ends the build where an object of one instruction set defines a function that the linker may take
# for every other's: a weak symbol, of std::vector<double> say, outside the instruction set's own
# namespace. On a processor without those instructions it would crash.
#   cmake -DNM=nm -DISA=avx512 "-DOBJECTS=a.o;b.o" -P isolated.cmake
set(shared "")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND "${NM}" --defined-only "${object}"
    OUTPUT_VARIABLE symbols RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "error: ${NM} can't read ${object}")
  endif()
  # DW.ref.* are pointers to what exceptions need, no code. Brackets would keep a list together.
  string(REGEX MATCHALL "[0-9a-f]+ [VWu] [^\n]+" weak "${symbols}")
  list(FILTER weak EXCLUDE REGEX " (DW\\.ref\\.|_Z[A-Z]*5grcsf[0-9]*${ISA})")
  list(APPEND shared ${weak})
endforeach()
list(TRANSFORM shared REPLACE "^[0-9a-f]+ . " "")
list(REMOVE_DUPLICATES shared)
if(shared)
  list(JOIN shared " " names)
  message(FATAL_ERROR "error: code for ${ISA} could run on other processors: ${names}; "
    "CMAKE_ARGS=-DGRCSF_BUILD_X86=OFF builds portable code only")
endif()
