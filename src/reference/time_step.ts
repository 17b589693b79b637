/** softplus(v) = ln(1 + e^v), without overflow and without losing small values. */
const softplus = (v: number): number => Math.max(v, 0) + Math.log1p(Math.exp(-Math.abs(v)));

/** d clamp(softplus(v), lo, hi) / dv: the logistic function, zero where the clamp acts. */
export function time_step_slope(v: number, [lo, hi]: readonly [number, number]): number {
  const dt = softplus(v);
  return dt < lo || dt > hi ? 0 : 1 / (1 + Math.exp(-v));
}

/** dt = clamp(softplus(v), lo, hi). */
export function time_step(v: number, [lo, hi]: readonly [number, number]): number {
  return Math.min(Math.max(softplus(v), lo), hi);
}
