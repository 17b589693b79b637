// dh = dy * 2 max(h, 0), with max(h, 0) = sqrt(squared): squared = max(h, 0)^2 is what relu2 gave.
//
// An invocation takes EACH elements, WG apart.
import package::lib::index::workgroup_index;

struct Params { count: u32 }

@group(0) @binding(0) var<storage, read> dy: array<f32>;
@group(0) @binding(1) var<storage, read> squared: array<f32>;
@group(0) @binding(2) var<storage, read_write> dh: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override EACH: u32 = 4;

@compute @workgroup_size(WG)
fn relu2_gradient(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = workgroup_index(wid, nwg) * WG * EACH + lane;
  for (var n = 0u; n < EACH; n++) {
    let i = first + n * WG;
    if (i < params.count) { dh[i] = dy[i] * 2.0 * sqrt(squared[i]); }
  }
}
