/** Randomness in front of a router: the same numbers for a token on whatever rank it lies. */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

const WG = 64;

export interface NoiseOptions {
  /** Number of the sequence of random numbers: one for every layer and purpose. */
  readonly stream: number;
}

/**
 * x * U(1 - amount, 1 + amount), every element with a factor of its own; the gradient has the same factors.
 *
 * @param x        f32 [T, D]
 * @param counter  u32 [4]: seed low word, seed high word, step; the last is not read
 * @param rows     u32 [T]: number of every token in the whole batch; null: 0 .. T - 1
 * @throws ShapeError for another rank, or an amount outside of 0 .. 1
 */
export const router_jitter = defineOp({
  name: "router_jitter",
  forward(
    ctx, x: Tensor, counter: Tensor, options: NoiseOptions & { readonly amount: number },
    rows: Tensor | null = null,
  ): Tensor {
    const { amount } = options;
    check(amount >= 0 && amount < 1, "router_jitter", "amount", "from 0 to below 1", amount);
    ctx.save({ counter, options, rows });
    return noise("router_jitter", "jitter", x, counter, options, rows);
  },
  backward({ counter, options, rows }, [dy]) {
    return dy ? [noise("router_jitter", "jitter", dy, counter, options, rows)] : [];
  },
});

/**
 * Random logits instead of the given ones, nearly normal with variance 1: experts are then loaded evenly
 * whatever the router does. The gradient passes straight through. For measuring speed.
 *
 * @param logits   f32 [T, E]
 * @param counter  u32 [4]: seed low word, seed high word, step; the last is not read
 * @param rows     u32 [T]: number of every token in the whole batch; null: 0 .. T - 1
 */
export const random_logits = defineOp({
  name: "random_logits",
  forward(_ctx, logits: Tensor, counter: Tensor, options: NoiseOptions, rows: Tensor | null = null): Tensor {
    return noise("random_logits", "random_logits", logits, counter, { ...options, amount: 0 }, rows);
  },
  backward: (_saved, [dy]) => [dy],
});

function noise(
  op: string, entry: "jitter" | "random_logits", x: Tensor, counter: Tensor,
  { stream, amount }: NoiseOptions & { readonly amount: number }, rows: Tensor | null,
): Tensor {
  check(x.shape.length === 2, op, "x", "[T, D]", x);
  const [T, D] = x.shape as [number, number];
  check(counter.size === 4, op, "counter", "[4]", counter);
  if (rows) check(rows.shape.length === 1 && rows.size === T, op, "rows", `[${T}]`, rows);
  const y = x.device.empty(x.shape);
  const parts = Math.max(Math.ceil(D / 4), 1);
  launch("moe/router_noise", {
    entry, bind: { ...(entry === "jitter" ? { x } : {}), counter, rows: rows ?? counter, y },
    params: { tokens: T, features: D, parts, stream, amount }, conditions: rows ? ["numbered"] : [],
    workgroups: [D === 0 ? 0 : Math.ceil((T * parts) / WG)],
  });
  return y;
}
