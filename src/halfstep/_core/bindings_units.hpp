// Adds the kernels of matrix units to the module.
#pragma once

#include <nanobind/nanobind.h>

void bind_units(nanobind::module_& m);
