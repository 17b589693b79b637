// dx = f'(x) * dy, element by element, for the two curved functions of unary.wgsl:
//   relu2: f'(x) = 2 max(x, 0) · silu (condition `silu`): f'(x) = s (1 + x (1 - s)), s = sigmoid(x)
//
// Elements and the invocations' share as in unary.wgsl.
import package::lib::index::workgroup_index;
import package::lib::share::first_element;
@if(silu) import package::lib::activations::{silu_grad, silu_grad4};

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> x: array<V>;
@group(0) @binding(1) var<storage, read> dy: array<V>;
@group(0) @binding(2) var<storage, read_write> dx: array<V>;

struct Params {
  count: u32, // in V
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override EACH: u32 = 4;
override APART: u32 = 64;

fn slope(v: V) -> V {
  @if(silu && vec4) return silu_grad4(v);
  @elif(silu) return silu_grad(v);
  @else return 2.0 * max(v, V());
}

@compute @workgroup_size(WG)
fn unary_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = first_element(workgroup_index(wid, nwg), lane);
  for (var n = 0u; n < EACH; n += 4u) {
    let i = first + n * APART;
    if (i + 3u * APART < params.count) {
      let d0 = slope(x[i]) * dy[i];
      let d1 = slope(x[i + APART]) * dy[i + APART];
      let d2 = slope(x[i + 2u * APART]) * dy[i + 2u * APART];
      let d3 = slope(x[i + 3u * APART]) * dy[i + 3u * APART];
      dx[i] = d0;
      dx[i + APART] = d1;
      dx[i + 2u * APART] = d2;
      dx[i + 3u * APART] = d3;
    } else {
      for (var j = i; j < min(i + 4u * APART, params.count); j += APART) {
        dx[j] = slope(x[j]) * dy[j];
      }
    }
  }
}
