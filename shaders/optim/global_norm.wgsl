// Euclidean norm over many tensors, in a fixed order, and the factor that clips gradients to it.
//
//   squares: partial[first + w] = sum of squares of slab w, WG * EACH elements of x; one workgroup per slab
//   total:   norm[0] = sqrt(sum of partial [count]); one workgroup
//   clip:    scale[0] = min(1, max_norm / (norm[0] + 1e-6)), or -1 where norm[0] or loss[0] is not finite;
//            one invocation
//
//   x is read in elements of V: vec4f where its size is a multiple of 4. Sums are f32.
import package::lib::index::workgroup_index;
import package::lib::reduce::workgroup_sum;

override WG: u32 = 64;
override EACH: u32 = 64;

@if(vec4) alias V = vec4f;
@else alias V = f32;

@if(vec4) fn inner(a: V, b: V) -> f32 { return dot(a, b); }
@else fn inner(a: V, b: V) -> f32 { return a * b; }

struct Params {
  count: u32,
  first: u32,
  max_norm: f32,
}

@group(0) @binding(0) var<storage, read> x: array<V>;
@group(0) @binding(1) var<storage, read_write> partial: array<f32>;
@group(0) @binding(2) var<storage, read_write> norm: array<f32>;
@group(0) @binding(3) var<storage, read_write> scale: array<f32>;
@group(0) @binding(4) var<storage, read> loss: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn squares(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let slab = workgroup_index(wid, nwg);
  if (slab * WG * EACH >= params.count) {
    return;
  }
  var sum = V(0.0);
  let end = min((slab + 1u) * WG * EACH, params.count);
  for (var i = slab * WG * EACH + lane; i < end; i += WG) {
    sum += x[i] * x[i];
  }
  let all = workgroup_sum(inner(sum, V(1.0)), lane);
  if (lane == 0u) {
    partial[params.first + slab] = all;
  }
}

@compute @workgroup_size(WG)
fn total(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  for (var i = lane; i < params.count; i += WG) {
    sum += partial[i];
  }
  let all = workgroup_sum(sum, lane);
  if (lane == 0u) {
    norm[0] = sqrt(all);
  }
}

// On the bits: a compiler may take it that no float is NaN or infinite.
fn is_finite(value: f32) -> bool {
  return (bitcast<u32>(value) & 0x7f800000u) != 0x7f800000u;
}

@compute @workgroup_size(1)
fn clip() {
  let clipped = min(1.0, params.max_norm / (norm[0] + 1e-6));
  scale[0] = select(-1.0, clipped, is_finite(norm[0]) && is_finite(loss[0]));
}
