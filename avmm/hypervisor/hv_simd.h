/*
 * The two functions that take a vector by value, which cffi cannot say; as in <Hypervisor/hv_vcpu.h>. Include it
 * after hv.h, which has no guard of its own.
 */
#ifndef AVMM_HV_SIMD_H
#define AVMM_HV_SIMD_H

typedef uint8_t hv_simd_fp_uchar16_t __attribute__((vector_size(16)));
hv_return_t hv_vcpu_get_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, hv_simd_fp_uchar16_t *value);
hv_return_t hv_vcpu_set_simd_fp_reg(hv_vcpu_t vcpu, hv_simd_fp_reg_t reg, hv_simd_fp_uchar16_t value);

#endif
