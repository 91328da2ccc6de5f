/*
 * The part of Apple's framework that came with macOS 15: a GICv3 inside the hypervisor, as far as avmm uses it.
 *
 * softhv exports it; on macOS irqchip.c looks it up at run time, since older systems lack it, and older SDKs its
 * declarations. Order: hv_vm_create, hv_gic_create, vCPUs; each vCPU's MPIDR_EL1 before any runs.
 */
typedef struct hv_gic_config_s *hv_gic_config_t;

hv_gic_config_t hv_gic_config_create(void);
hv_return_t hv_gic_config_set_distributor_base(hv_gic_config_t config, hv_ipa_t distributor_base_address);
hv_return_t hv_gic_config_set_redistributor_base(hv_gic_config_t config, hv_ipa_t redistributor_base_address);
hv_return_t hv_gic_create(hv_gic_config_t gic_config);
hv_return_t hv_gic_reset(void);
hv_return_t hv_gic_set_spi(uint32_t intid, bool level);
hv_return_t hv_gic_get_spi_interrupt_range(uint32_t *spi_intid_base, uint32_t *spi_intid_count);
