// What this CPU and kernel lack for an instruction set, by name; empty when nothing.
#pragma once
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace SA_NAMESPACE {

#if defined(__x86_64__)
inline const char* missing_avx2() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return "avx2";
  if (!__builtin_cpu_supports("fma")) return "fma";
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 29))) return "f16c";
  return "";
}

inline const char* missing_avx512() {
  if (const char* lacks = missing_avx2(); *lacks) return lacks;
  if (!__builtin_cpu_supports("avx512f")) return "avx512f";
  if (!__builtin_cpu_supports("avx512bw")) return "avx512bw";
  if (!__builtin_cpu_supports("avx512vl")) return "avx512vl";
  if (!__builtin_cpu_supports("avx512dq")) return "avx512dq";
  return "";
}

inline const char* missing_amx() {
  if (const char* lacks = missing_avx512(); *lacks) return lacks;
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  if (!(d & (1u << 24))) return "amx_tile";
  if (!(d & (1u << 22))) return "amx_bf16";
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  if (!(a & (1u << 5))) return "avx512_bf16";
#if defined(__linux__)
  // tile registers are granted per process, and inherited by fork: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return "permission for AMX from the kernel (arch_prctl)";
  return "";
#else
  return "Linux, which grants AMX";
#endif
}
#endif

// torch op: missing(isa); asking for amx also requests the permission to use it
inline std::string missing_feature(std::string isa) {
  if (isa == "generic") return "";
#if defined(__x86_64__)
  if (isa == "avx2") return missing_avx2();
  if (isa == "avx512" || isa == "amx_emulated") return missing_avx512();
  if (isa == "amx") return missing_amx();
#endif
  return isa;
}

}  // namespace SA_NAMESPACE
