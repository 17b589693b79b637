// AdamW with decoupled weight decay, in place:
//   g = grad * grad_scale;  m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
//   param -= lr * weight_decay * param if params.decay, then
//   param -= lr * (m / correction1) / (sqrt(v / correction2) + eps)
//
//   param, grad, m, v: f32 of one size, in elements of V: vec4f where the size is a multiple of 4.
//   hyper [8]: lr, beta1, beta2, eps, weight_decay, correction1 = 1 - beta1^t, correction2 = 1 - beta2^t, 0
//   grad_scale [1]. Both are tensors so that a captured training step can be replayed with new values.
//
// One invocation takes EACH elements, a workgroup apart. Source: Loshchilov and Hutter (arXiv 1711.05101).
import package::lib::index::workgroup_index;

override WG: u32 = 64;
override EACH: u32 = 8;

@if(vec4) alias V = vec4f;
@else alias V = f32;

struct Params {
  count: u32, // in V
  decay: u32,
}

@group(0) @binding(0) var<storage, read_write> param: array<V>;
@group(0) @binding(1) var<storage, read> grad: array<V>;
@group(0) @binding(2) var<storage, read_write> m: array<V>;
@group(0) @binding(3) var<storage, read_write> v: array<V>;
@group(0) @binding(4) var<storage, read> hyper: array<f32, 8>;
@group(0) @binding(5) var<storage, read> grad_scale: array<f32, 1>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn adamw(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let first = workgroup_index(wid, nwg) * WG * EACH + lane;
  if (first >= params.count) {
    return;
  }
  let lr = hyper[0];
  let beta1 = hyper[1];
  let beta2 = hyper[2];
  let eps = hyper[3];
  let shrink = select(0.0, lr * hyper[4], params.decay != 0u);
  let correction1 = hyper[5];
  let correction2 = hyper[6];
  let scale = grad_scale[0];
  for (var j = 0u; j < EACH; j++) {
    let i = first + j * WG;
    if (i >= params.count) {
      break;
    }
    let g = grad[i] * scale;
    let m_new = beta1 * m[i] + (1.0 - beta1) * g;
    let v_new = beta2 * v[i] + (1.0 - beta2) * g * g;
    m[i] = m_new;
    v[i] = v_new;
    let p = param[i];
    param[i] = p - shrink * p - lr * (m_new / correction1) / (sqrt(v_new / correction2) + eps);
  }
}
