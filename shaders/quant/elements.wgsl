// Single elements: codes of values, values of codes, and the exact arithmetic that scales are made with.
//
// encode  codes[i] = the code nearest to values[i], or with `random` the one that the low bits of random[i]
//         choose; the format is one of E4M3, E5M2, E2M1, bf16, f16, E8M0 upwards, E8M0 downwards
// decode  codes[i] = the bits of the value of code values[i]
// divide, multiply  codes[i] = |values[i]| (/, *) |others[i]|
//
// All numbers are bits in u32. The format is a parameter, since these are for checks and conversions that
// happen once: kernels that encode on the way name their format where they are compiled.

import package::lib::index::workgroup_index;
import package::lib::formats::{
  E4M3, E5M2, E2M1, BF16, F16, element_code, random_code, element_value, power_above, power_below,
  power_value,
};
import package::lib::exact::{exact_quotient, exact_product};

struct Params { count: u32, format: u32, random: u32 }  // random: 0 or 1

@group(0) @binding(0) var<storage, read> values: array<u32>;
@group(0) @binding(1) var<storage, read> others: array<u32>;
@group(0) @binding(2) var<storage, read_write> codes: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

fn code_of(bits: u32, random: u32) -> u32 {
  let at_random = params.random == 1u;
  switch (params.format) {
    case 0u: { return select(element_code(bits, E4M3), random_code(bits, random, E4M3), at_random); }
    case 1u: { return select(element_code(bits, E5M2), random_code(bits, random, E5M2), at_random); }
    case 2u: { return select(element_code(bits, E2M1), random_code(bits, random, E2M1), at_random); }
    case 3u: { return select(element_code(bits, BF16), random_code(bits, random, BF16), at_random); }
    case 4u: { return select(element_code(bits, F16), random_code(bits, random, F16), at_random); }
    case 5u: { return power_above(bits); }
    default: { return power_below(bits); }
  }
}

fn value_of(code: u32) -> u32 {
  switch (params.format) {
    case 0u: { return element_value(code, E4M3); }
    case 1u: { return element_value(code, E5M2); }
    case 2u: { return element_value(code, E2M1); }
    case 3u: { return element_value(code, BF16); }
    case 4u: { return element_value(code, F16); }
    default: { return power_value(code); }
  }
}

@compute @workgroup_size(WG)
fn encode(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i < params.count) { codes[i] = code_of(values[i], others[select(0u, i, params.random == 1u)]); }
}

@compute @workgroup_size(WG)
fn decode(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i < params.count) { codes[i] = value_of(values[i]); }
}

@compute @workgroup_size(WG)
fn arithmetic(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.count) { return; }
  let x = values[i] & 0x7fffffffu;
  let y = others[i] & 0x7fffffffu;
  if (params.format == 0u) { codes[i] = exact_quotient(x, y); }
  else { codes[i] = exact_product(x, y); }
}
