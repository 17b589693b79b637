import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/**
 * One step of AdamW with decoupled weight decay: what `adamw` leaves in param, m and v (all of one shape).
 *
 * @param hyper       [8]: lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, 1 - beta2^t, 0
 * @param grad_scale  [1], multiplies the gradient first
 * @param decay       whether weight_decay applies to this parameter
 */
export function adamw(
  param: NdArray, grad: NdArray, m: NdArray, v: NdArray, hyper: NdArray, grad_scale: NdArray, decay: boolean,
): [NdArray, NdArray, NdArray] {
  const [lr, beta1, beta2, eps, weight_decay, correction1, correction2] =
    hyper.data as unknown as [number, number, number, number, number, number, number];
  const [p_new, m_new, v_new] = [ndarray(param.shape), ndarray(m.shape), ndarray(v.shape)];
  for (let i = 0; i < param.data.length; i++) {
    const g = grad.data[i]! * grad_scale.data[0]!;
    m_new.data[i] = beta1 * m.data[i]! + (1 - beta1) * g;
    v_new.data[i] = beta2 * v.data[i]! + (1 - beta2) * g * g;
    const decayed = param.data[i]! * (decay ? 1 - lr * weight_decay : 1);
    const [mean, square] = [m_new.data[i]! / correction1, v_new.data[i]! / correction2];
    p_new.data[i] = decayed - (lr * mean) / (Math.sqrt(square) + eps);
  }
  return [p_new, m_new, v_new];
}
