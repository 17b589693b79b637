// y = f(x), element by element: f is relu(x)^2 or x * sigmoid(x) with the condition `relu2` or `silu`, else s
// * x.
//
// x, y have `count` elements of V: vec4f where the size is a multiple of 4 (condition `vec4`). lib/share
// says which of them an invocation makes.
import package::lib::index::workgroup_index;
import package::lib::share::first_element;
@if(silu) import package::lib::activations::{silu, silu4};

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> x: array<V>;
@group(0) @binding(1) var<storage, read_write> y: array<V>;

struct Params {
  count: u32, // in V
  s: f32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override EACH: u32 = 4;
override APART: u32 = 64;

fn apply(v: V) -> V {
  @if(relu2) {
    let positive = max(v, V());
    return positive * positive;
  }
  @elif(silu && vec4) return silu4(v);
  @elif(silu) return silu(v);
  @else return v * params.s;
}

@compute @workgroup_size(WG)
fn unary(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = first_element(workgroup_index(wid, nwg), lane);
  for (var n = 0u; n < EACH; n += 4u) {
    let i = first + n * APART;
    if (i + 3u * APART < params.count) {
      let x0 = x[i];
      let x1 = x[i + APART];
      let x2 = x[i + 2u * APART];
      let x3 = x[i + 3u * APART];
      y[i] = apply(x0);
      y[i + APART] = apply(x1);
      y[i + 2u * APART] = apply(x2);
      y[i + 3u * APART] = apply(x3);
    } else {
      for (var j = i; j < min(i + 4u * APART, params.count); j += APART) {
        y[j] = apply(x[j]);
      }
    }
  }
}
