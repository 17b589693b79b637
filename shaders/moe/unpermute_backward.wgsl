// Gradients of out[t] = sum_k topk_weight[t, k] * y[token_slot[t * K + k]]:
//   dy[slot] = topk_weight * dout[t], dweight[t, k] = dot(dout[t], y[slot])
//
//   y, dy [T * K, D]; topk_weight, dweight [T, K]; dout [T, D]; f32, in elements of V: vec4f where D is a
//   multiple of 4.
//
// `spare`: choices without a slot below
// offsets[experts] and `slots` have zero gradients; rows of y that belong to none get none here.
//
// LANES invocations take one choice (t, k); their parts of the dot product are added in a fixed order. With
// LANES = 1 there is no barrier, which suits software adapters.
import package::lib::index::workgroup_index;

override WG: u32 = 64;
override LANES: u32 = 1;

@if(vec4) alias V = vec4f;
@else alias V = f32;

@if(vec4) fn inner(a: V, b: V) -> f32 { return dot(a, b); }
@else fn inner(a: V, b: V) -> f32 { return a * b; }

struct Params {
  choices: u32,
  cols: u32, // in V
  topk: u32,
  slots: u32,
  experts: u32,
}

@group(0) @binding(0) var<storage, read> y: array<V>;
@group(0) @binding(1) var<storage, read> topk_weight: array<f32>;
@group(0) @binding(2) var<storage, read> token_slot: array<u32>;
@group(0) @binding(3) var<storage, read> dout: array<V>;
@group(0) @binding(4) var<storage, read_write> dy: array<V>;
@group(0) @binding(5) var<storage, read_write> dweight: array<f32>;
@if(spare) @group(0) @binding(6) var<storage, read> offsets: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> parts: array<f32, WG>;

@compute @workgroup_size(WG)
fn unpermute_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) invocation: u32,
) {
  let choice = workgroup_index(wid, nwg) * (WG / LANES) + invocation / LANES;
  let lane = invocation % LANES;
  var sum = 0.0;
  var counts = choice < params.choices;
  @if(spare) {
    if (counts) { counts = token_slot[choice] < min(params.slots, offsets[params.experts]); }
  }
  if (counts) {
    let w = topk_weight[choice];
    let slot_row = min(token_slot[choice], params.slots - 1u) * params.cols;
    let token_row = choice / params.topk * params.cols;
    for (var c = lane; c < params.cols; c += LANES) {
      let g = dout[token_row + c];
      dy[slot_row + c] = w * g;
      sum += inner(g, y[slot_row + c]);
    }
  }
  if (LANES > 1u) {
    parts[invocation] = sum;
    workgroupBarrier();
    if (lane == 0u) {
      for (var other = 1u; other < LANES; other++) {
        sum += parts[invocation + other];
      }
    }
  }
  if (lane == 0u && choice < params.choices) {
    dweight[choice] = sum;
  }
}
