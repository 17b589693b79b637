// add: y = a + b. accumulate: dst += src, in place.
//
// `count` elements of V: vec4f where the size is a multiple of 4 (condition `vec4`). One invocation makes
// EACH of them, WG apart, so that neighbours touch neighbouring memory.
import package::lib::index::workgroup_index;

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> a: array<V>;
@group(0) @binding(1) var<storage, read> b: array<V>;
@group(0) @binding(2) var<storage, read_write> y: array<V>;
@group(0) @binding(3) var<storage, read_write> dst: array<V>;
@group(0) @binding(4) var<storage, read> src: array<V>;

struct Params {
  count: u32, // in V
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override EACH: u32 = 4;

@compute @workgroup_size(WG)
fn add(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = workgroup_index(wid, nwg) * WG * EACH + lane;
  for (var n = 0u; n < EACH; n++) {
    let i = first + n * WG;
    if (i < params.count) {
      y[i] = a[i] + b[i];
    }
  }
}

@compute @workgroup_size(WG)
fn accumulate(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = workgroup_index(wid, nwg) * WG * EACH + lane;
  for (var n = 0u; n < EACH; n++) {
    let i = first + n * WG;
    if (i < params.count) {
      dst[i] += src[i];
    }
  }
}
