import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/**
 * One step of AdamW with decoupled weight decay: what `adamw` leaves in param, m and v (all of one shape).
 *
 * @param table       [slabs, 3]: first and end of a slab in units of 4 elements, and 1 where weight_decay
 *   applies; the rest stays as it is
 * @param hyper       [8]: lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, 1 - beta2^t, 0
 * @param grad_scale  [1], multiplies the gradient first; negative: nothing changes
 */
export function adamw(
  param: NdArray, grad: NdArray, m: NdArray, v: NdArray, table: NdArray, hyper: NdArray, grad_scale: NdArray,
): [NdArray, NdArray, NdArray] {
  const [lr, beta1, beta2, eps, weight_decay, correction1, correction2] =
    hyper.data as unknown as [number, number, number, number, number, number, number];
  const [p_new, m_new, v_new] = [param, m, v].map(({ shape, data }) => ndarray(shape, data.slice())) as
    [NdArray, NdArray, NdArray];
  for (let slab = 0; slab < table.data.length && grad_scale.data[0]! >= 0; slab += 3) {
    const [first, end, decays] = table.data.subarray(slab, slab + 3) as unknown as [number, number, number];
    for (let i = 4 * first; i < 4 * end; i++) {
      const g = grad.data[i]! * grad_scale.data[0]!;
      m_new.data[i] = beta1 * m.data[i]! + (1 - beta1) * g;
      v_new.data[i] = beta2 * v.data[i]! + (1 - beta2) * g * g;
      const decayed = param.data[i]! * (decays ? 1 - lr * weight_decay : 1);
      const [mean, square] = [m_new.data[i]! / correction1, v_new.data[i]! / correction2];
      p_new.data[i] = decayed - (lr * mean) / (Math.sqrt(square) + eps);
    }
  }
  return [p_new, m_new, v_new];
}
