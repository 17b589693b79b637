import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { randomBits } from "../tensor/philox.ts";

/**
 * One step of AdamW with decoupled weight decay: what `adamw` leaves in param, m and v.
 *
 * @param m, v        as param, or the words of eight-bit moments: see `decodeMoments`
 * @param table       [slabs, 3]: first and end of a slab in units of 4 elements, and 1 where weight_decay
 *   applies; the rest stays as it is
 * @param hyper       [8]: lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, 1 - beta2^t, 0
 * @param grad_scale  [1], multiplies the gradient first; negative: nothing changes
 * @param rounding    of eight-bit moments
 */
export function adamw(
  param: NdArray, grad: NdArray, m: NdArray, v: NdArray, table: NdArray, hyper: NdArray, grad_scale: NdArray,
  _low: null = null, rounding: { seed: number; stream: number } = { seed: 0, stream: 0 },
): NdArray[] {
  if (m.data.length !== param.data.length) {
    const size = param.data.length;
    const [first, second] = [decodeMoments(m, size, "m"), decodeMoments(v, size, "v")];
    const [p, mean, square] = adamw(param, grad, first, second, table, hyper, grad_scale) as
      [NdArray, NdArray, NdArray];
    const key = { ...rounding, step: hyper.data[7]! };
    return [p, encodeMoments(mean, "m", key), encodeMoments(square, "v", key)];
  }
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

const BLOCK = 64;
const MOST = { m: 127, v: 255 };
const bits = new Float32Array(1);
const words = new Uint32Array(bits.buffer);

/**
 * Values of moments of eight bits. The words hold four codes each, the first in the low byte, and after all
 * codes an f32 scale s for every 64: m = s q |q| / 127^2 with q signed, v = (s q^2 / 255^2)^2.
 */
export function decodeMoments({ data }: NdArray, size: number, moment: "m" | "v"): NdArray {
  const codes = Math.ceil(size / BLOCK) * (BLOCK / 4);
  return ndarray([size], Array.from({ length: size }, (_, i) => {
    const byte = (data[i >> 2]! >>> (8 * (i % 4))) & 255;
    words[0] = data[codes + Math.floor(i / BLOCK)]!;
    const q = moment === "m" ? (byte << 24) >> 24 : byte;
    const value = (bits[0]! * q * Math.abs(q)) / MOST[moment] ** 2;
    return moment === "m" ? value : value * value;
  }));
}

/**
 * Moments of eight bits: of the two codes around a value one at random, the nearer with more probability, so
 * that the expected value is the value; of a v that is not zero never zero.
 */
export function encodeMoments(
  { data }: NdArray, moment: "m" | "v", key: { seed: number; stream: number; step: number },
): NdArray {
  const blocks = Math.ceil(data.length / BLOCK);
  const out = ndarray([blocks * (BLOCK / 4 + 1)]);
  for (let block = 0; block < blocks; block++) {
    const values = data.subarray(block * BLOCK, (block + 1) * BLOCK);
    const root = moment === "m" ? Math.abs : Math.sqrt;
    bits[0] = Math.max(1e-30, ...values.map(root));
    out.data[blocks * (BLOCK / 4) + block] = words[0]!;
    values.forEach((value, j) => {
      const i = block * BLOCK + j;
      const most = MOST[moment];
      const q = Math.sqrt(root(value) / bits[0]!) * most;
      const power = moment === "m" ? 2 : 4;
      const below = Math.floor(q);
      const past = (q ** power - below ** power) / ((below + 1) ** power - below ** power);
      const random = (randomBits(key, i) >>> (moment === "m" ? 16 : 24)) & 255;
      const code = Math.min(most, below + (past * 256 > random + 0.5 ? 1 : 0));
      const least = moment === "v" && value > 0 ? 1 : 0;
      const byte = (value < 0 ? -code : Math.max(code, least)) & 255;
      out.data[i >> 2] = (out.data[i >> 2]! | (byte << (8 * (i % 4)))) >>> 0;
    });
  }
  return out;
}
