// y = a * b, element by element.
//
// `count` elements of V: vec4f where the size is a multiple of 4 (condition `vec4`). lib/share says which
// of them an invocation makes.
import package::lib::index::workgroup_index;
import package::lib::share::first_element;

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> a: array<V>;
@group(0) @binding(1) var<storage, read> b: array<V>;
@group(0) @binding(2) var<storage, read_write> y: array<V>;

struct Params {
  count: u32, // in V
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override EACH: u32 = 4;
override APART: u32 = 64;

@compute @workgroup_size(WG)
fn multiply(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = first_element(workgroup_index(wid, nwg), lane);
  for (var n = 0u; n < EACH; n++) {
    let i = first + n * APART;
    if (i < params.count) { y[i] = a[i] * b[i]; }
  }
}
