# Builds for Android without the NDK: clang and lld from the system, declarations and stub library of our own for what
# we call of Android's C library. What links here asks for exactly the symbols in bionic.txt, each with its API level.
# LORDBA_STUBS names the folder of the stub library (scripts/check_android_native.sh makes them).
set(CMAKE_SYSTEM_NAME Linux) # CMake's own "Android" insists on an NDK
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(ANDROID TRUE)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES LORDBA_STUBS)

set(CMAKE_C_COMPILER clang-19)
set(CMAKE_CXX_COMPILER clang++-19)
set(CMAKE_C_COMPILER_TARGET aarch64-linux-android26)
set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-android26)
# The helpers that outlined atomics call are in the NDK's compiler-rt.
string(JOIN " " CMAKE_C_FLAGS_INIT -ffreestanding -nostdlibinc -mno-outline-atomics
       "-isystem ${CMAKE_CURRENT_LIST_DIR}/include")
set(link "-nostdlib -fuse-ld=lld-19 -L${LORDBA_STUBS}")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "${link}")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "${link}")
set(CMAKE_C_STANDARD_LIBRARIES -lc)
