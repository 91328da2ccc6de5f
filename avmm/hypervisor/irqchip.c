/* hv_gic_*, by name where the system may lack them. See irqchip.h. */
#ifdef __APPLE__
#include <Hypervisor/Hypervisor.h>
#include <dlfcn.h>
#include <os/object.h>
/* An object for the host's reference counting, a pointer to anybody else. */
#define CONFIG void *
#else
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hv.h"
#include "hv_gic.h"
#include "softhv/softhv.h"
#define CONFIG hv_gic_config_t
#endif

#include "irqchip.h"

#define UNSUPPORTED ((hv_return_t)0xfae9400f)

/* hv_gic.h's functions. */
static struct {
    CONFIG (*config_create)(void);
    hv_return_t (*set_distributor_base)(CONFIG, hv_ipa_t);
    hv_return_t (*set_redistributor_base)(CONFIG, hv_ipa_t);
    hv_return_t (*create)(CONFIG);
    hv_return_t (*reset)(void);
    hv_return_t (*set_spi)(uint32_t, bool);
    hv_return_t (*spi_range)(uint32_t *, uint32_t *);
} gic;

#ifdef __APPLE__
static void *found(const char *name, bool *all) {
    void *function = dlsym(RTLD_DEFAULT, name);
    *all = *all && function;
    return function;
}

/* False: this system has none. */
static bool find(void) {
    bool all = true;
    *(void **)&gic.config_create = found("hv_gic_config_create", &all);
    *(void **)&gic.set_distributor_base = found("hv_gic_config_set_distributor_base", &all);
    *(void **)&gic.set_redistributor_base = found("hv_gic_config_set_redistributor_base", &all);
    *(void **)&gic.create = found("hv_gic_create", &all);
    *(void **)&gic.reset = found("hv_gic_reset", &all);
    *(void **)&gic.set_spi = found("hv_gic_set_spi", &all);
    *(void **)&gic.spi_range = found("hv_gic_get_spi_interrupt_range", &all);
    return all;
}
static void release(void *config) { os_release(config); }
#else
static bool find(void) {
    gic.config_create = hv_gic_config_create;
    gic.set_distributor_base = hv_gic_config_set_distributor_base;
    gic.set_redistributor_base = hv_gic_config_set_redistributor_base;
    gic.create = hv_gic_create;
    gic.reset = hv_gic_reset;
    gic.set_spi = hv_gic_set_spi;
    gic.spi_range = hv_gic_get_spi_interrupt_range;
    return true;
}
static void release(hv_gic_config_t config) { softhv_release(config); }
#endif

hv_return_t avmm_gic_create(hv_ipa_t distributor, hv_ipa_t redistributors) {
    if (!find()) /* to the same values each time */
        return UNSUPPORTED;
    CONFIG config = gic.config_create();
    if (!config)
        return UNSUPPORTED;
    hv_return_t result = gic.set_distributor_base(config, distributor);
    if (!result)
        result = gic.set_redistributor_base(config, redistributors);
    if (!result)
        result = gic.create(config);
    release(config);
    return result;
}

hv_return_t avmm_gic_reset(void) { return gic.reset ? gic.reset() : UNSUPPORTED; }

hv_return_t avmm_gic_set_spi(uint32_t intid, bool level) {
    return gic.set_spi ? gic.set_spi(intid, level) : UNSUPPORTED;
}

hv_return_t avmm_gic_spi_range(uint32_t *first, uint32_t *count) {
    return gic.spi_range ? gic.spi_range(first, count) : UNSUPPORTED;
}
