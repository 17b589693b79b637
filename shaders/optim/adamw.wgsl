// AdamW with decoupled weight decay, in place:
//   g = grad * grad_scale;  m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
//   param -= lr * weight_decay * param if params.decay, then
//   param -= lr * (m / correction1) / (sqrt(v / correction2) + eps)
//
//   param, grad, m, v: f32 of one size, many parameters side by side, in elements of vec4f.
//   slabs [count, 3]: first element, end, and 1 where the parameter decays; one workgroup per slab.
//   hyper [8]: lr, beta1, beta2, eps, weight_decay, correction1 = 1 - beta1^t, correction2 = 1 - beta2^t, 0
//   grad_scale [1], negative: nothing changes.
//   Both are tensors so that a captured training step can be replayed with new values.
//
// Source: Loshchilov and Hutter (arXiv 1711.05101).
import package::lib::index::workgroup_index;

override WG: u32 = 64;

struct Params {
  count: u32, // slabs
}

@group(0) @binding(0) var<storage, read_write> param: array<vec4f>;
@group(0) @binding(1) var<storage, read> grad: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> m: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> v: array<vec4f>;
@group(0) @binding(4) var<storage, read> hyper: array<f32, 8>;
@group(0) @binding(5) var<storage, read> grad_scale: array<f32, 1>;
@group(0) @binding(6) var<storage, read> slabs: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn adamw(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let slab = workgroup_index(wid, nwg);
  let scale = grad_scale[0];
  if (slab >= params.count || scale < 0.0) {
    return;
  }
  let first = slabs[3u * slab];
  let end = slabs[3u * slab + 1u];
  let lr = hyper[0];
  let beta1 = hyper[1];
  let beta2 = hyper[2];
  let eps = hyper[3];
  let shrink = select(0.0, lr * hyper[4], slabs[3u * slab + 2u] != 0u);
  let correction1 = hyper[5];
  let correction2 = hyper[6];
  for (var i = first + lane; i < end; i += WG) {
    let g = grad[i] * scale;
    let m_new = beta1 * m[i] + (1.0 - beta1) * g;
    let v_new = beta2 * v[i] + (1.0 - beta2) * g * g;
    m[i] = m_new;
    v[i] = v_new;
    let p = param[i];
    param[i] = p - shrink * p - lr * (m_new / correction1) / (sqrt(v_new / correction2) + eps);
  }
}
