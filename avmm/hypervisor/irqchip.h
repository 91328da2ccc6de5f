/*
 * The hypervisor's own GICv3, found at run time: what of hv_gic.h may be missing on this system is missing here too.
 *
 * Compiled into both builds, read by cffi as well as by C. All return HV_UNSUPPORTED where there is no such thing.
 */

/* A GIC with its registers there, for the VM that has no vCPU yet. */
hv_return_t avmm_gic_create(hv_ipa_t distributor, hv_ipa_t redistributors);
/* As at first, while no vCPU runs. */
hv_return_t avmm_gic_reset(void);
/* Any thread. `intid` counts SGIs and PPIs too: the first SPI is 32. */
hv_return_t avmm_gic_set_spi(uint32_t intid, bool level);
hv_return_t avmm_gic_spi_range(uint32_t *first, uint32_t *count);
