// Rows in expert order times the weight of their choice: out[slot] = w[slot_token[slot]] * x[slot].
//
//   x, out, dout, dx [R, D], in elements of V: vec4f where D is a multiple of 4; topk_weight, dweight by
//   choice
//
// weigh:          one invocation takes one element of out
// weigh_backward: dx[slot] = w * dout[slot], under the condition `squared`, where x = max(h, 0)^2, the
//                 gradient of h instead: times 2 sqrt(x); dweight[choice] = dot(dout[slot], x[slot]). LANES
//                 invocations take one slot and add their parts in a fixed order; with LANES = 1 there is no
//                 barrier. dweight comes cleared where some choices have no slot.
import package::lib::index::workgroup_index;
import package::lib::plan::NO_TOKEN;

override WG: u32 = 64;
override LANES: u32 = 1;

@if(vec4) alias V = vec4f;
@else alias V = f32;

@if(vec4) fn inner(a: V, b: V) -> f32 { return dot(a, b); }
@else fn inner(a: V, b: V) -> f32 { return a * b; }

struct Params {
  slots: u32,
  cols: u32, // in V
}

@group(0) @binding(0) var<storage, read> x: array<V>;
@group(0) @binding(1) var<storage, read> topk_weight: array<f32>;
@group(0) @binding(2) var<storage, read> slot_token: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<V>;
@group(0) @binding(4) var<storage, read> dout: array<V>;
@group(0) @binding(5) var<storage, read_write> dx: array<V>;
@group(0) @binding(6) var<storage, read_write> dweight: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> parts: array<f32, WG>;

// The choice that a slot holds; what is none is NO_TOKEN.
fn choice_of(slot: u32) -> u32 {
  let choice = slot_token[slot];
  return select(NO_TOKEN, choice, choice < arrayLength(&topk_weight));
}

@compute @workgroup_size(WG)
fn weigh(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.slots * params.cols) {
    return;
  }
  let choice = choice_of(i / params.cols);
  if (choice == NO_TOKEN) {
    out[i] = V(0.0);
  } else {
    out[i] = topk_weight[choice] * x[i];
  }
}

@compute @workgroup_size(WG)
fn weigh_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) invocation: u32,
) {
  let slot = workgroup_index(wid, nwg) * (WG / LANES) + invocation / LANES;
  let lane = invocation % LANES;
  var choice = NO_TOKEN;
  var sum = 0.0;
  if (slot < params.slots) {
    choice = choice_of(slot);
    let row = slot * params.cols;
    if (choice == NO_TOKEN) {
      for (var c = lane; c < params.cols; c += LANES) {
        dx[row + c] = V(0.0);
      }
    } else {
      let w = topk_weight[choice];
      for (var c = lane; c < params.cols; c += LANES) {
        let g = dout[row + c];
        let value = x[row + c];
        @if(squared) dx[row + c] = w * g * 2.0 * sqrt(value);
        @else dx[row + c] = w * g;
        sum += inner(g, value);
      }
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
  if (lane == 0u && choice != NO_TOKEN) {
    dweight[choice] = sum;
  }
}
