// y = x in another number format: f32, or f16 and bf16 packed in pairs (lib/half).
//
// Conditions name the format of either side (`x_f16`, `x_bf16`, `y_f16`, `y_bf16`; f32 without one). An
// invocation converts EACH pairs of elements, WG apart. Rounding: to nearest, ties to even.

import package::lib::index::workgroup_index;
@if(x_f16) import package::lib::half::f16_pair;
@if(x_bf16) import package::lib::half::bf16_pair;
@if(y_f16) import package::lib::half::f16_pack;
@if(y_bf16) import package::lib::half::bf16_pack;

@if(x_f16 || x_bf16) alias X = u32;
@else alias X = f32;
@if(y_f16 || y_bf16) alias Y = u32;
@else alias Y = f32;

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> y: array<Y>;

struct Params { count: u32 } // elements
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override EACH: u32 = 4;

// Elements 2 i and 2 i + 1; past an odd end the second is zero.
fn pair(i: u32) -> vec2f {
  @if(x_f16) return f16_pair(x[i]);
  @elif(x_bf16) return bf16_pair(x[i]);
  @else {
    var second = 0.0;
    if (2u * i + 1u < params.count) { second = x[2u * i + 1u]; }
    return vec2f(x[2u * i], second);
  }
}

fn put(i: u32, v: vec2f) {
  @if(y_f16) y[i] = f16_pack(v);
  @elif(y_bf16) y[i] = bf16_pack(v);
  @else {
    y[2u * i] = v.x;
    if (2u * i + 1u < params.count) { y[2u * i + 1u] = v.y; }
  }
}

@compute @workgroup_size(WG)
fn convert(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = workgroup_index(wid, nwg) * WG * EACH + lane;
  for (var n = 0u; n < EACH; n++) {
    let i = first + n * WG;
    if (2u * i < params.count) { put(i, pair(i)); }
  }
}
