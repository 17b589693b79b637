import { expect, test } from "vitest";
import { expert_load, update_expert_bias } from "../../src/reference/moe.ts";
import { router_quantile, update_quantile_bias } from "../../src/reference/quantile_balance.ts";
import { router, type RouterOptions, router_vjp } from "../../src/reference/router.ts";
import {
  router_aux_counts, router_aux_loss, router_aux_loss_vjp, router_z_loss, router_z_loss_vjp,
} from "../../src/reference/router_loss.ts";
import { random_logits, router_jitter } from "../../src/reference/router_noise.ts";
import { sinkhorn } from "../../src/reference/sinkhorn.ts";
import { type NdArray, ndarray } from "../../src/tensor/ndarray.ts";
import { Draw } from "../ops/suite.ts";

// Worked numbers for one token and eight experts, and for one sequence of three tokens and four experts.
const logits = ndarray([1, 8], [1, -0.5, 0.25, 0.75, -1.25, 2, 0.5, -2]);
const bias = ndarray([8], [0, 0.3, -0.1, 0.05, 0.2, -0.4, 0.1, 0.6]);
const sequence = ndarray([3, 4], [1, -0.5, 0.25, 0.75, 0.3, 0.9, -0.2, 0.1, -1, 0.5, 2, 0.4]);

const expectClose = (found: ArrayLike<number>, expected: number[], within: number) => {
  expect(found).toHaveLength(expected.length);
  expected.forEach((value, i) => expect(Math.abs(found[i]! - value)).toBeLessThanOrEqual(within));
};

test.each([
  { n_group: 1, topk_group: 1, experts: [0, 3, 6], weights: [0.89912407, 0.83531735, 0.76555858] },
  { n_group: 4, topk_group: 2, experts: [0, 6, 7], weights: [1.24099993, 1.05664855, 0.20235152] },
  { n_group: 2, topk_group: 1, experts: [0, 1, 3], weights: [1.02230059, 0.52794681, 0.9497526] },
])("router with $n_group groups of which $topk_group stay", ({ n_group, topk_group, experts, weights }) => {
  const options = { topk: 3, n_group, topk_group, norm_topk_prob: true, scaling: 2.5 };
  const [weight, idx] = router(logits, bias, options);
  expect([...idx.data]).toEqual(experts);
  expectClose(weight.data, weights, 6e-9);
});

test("without normalisation the weights are the scaled scores", () => {
  const options = { topk: 3, n_group: 1, topk_group: 1, norm_topk_prob: false, scaling: 2 };
  expectClose(router(logits, bias, options)[0].data, [0.73105858 * 2, 0.6791787 * 2, 0.62245933 * 2], 1.1e-8);
});

const SCORES = ["sigmoid", "softmax", "softmax_chosen", "sqrtsoftplus"] as const;
const many = ndarray([40, 16], new Draw(3).normal([40, 16]).data);
const none = ndarray([16]);

test.each(SCORES)("normalised weights of a token add up to the scaling (%s)", (score) => {
  const options = { topk: 4, n_group: 1, topk_group: 1, norm_topk_prob: true, scaling: 2.5, score };
  const [weight] = router(many, none, options);
  for (let t = 0; t < 40; t++) {
    expect(weight.data.subarray(4 * t, 4 * t + 4).reduce((a, b) => a + b)).toBeCloseTo(2.5, 12);
  }
});

test("softmax over all adds up to 1 where every expert is chosen, and to less otherwise", () => {
  const options = { n_group: 1, topk_group: 1, norm_topk_prob: false, scaling: 1, score: "softmax" } as const;
  const sum = (topk: number) => router(ndarray([1, 8], logits.data), ndarray([8]), { ...options, topk })[0]
    .data.reduce((a, b) => a + b);
  expect(sum(8)).toBeCloseTo(1, 14);
  expect(sum(7)).toBeLessThan(1 - 1e-3);
});

test.each(SCORES)("constant logits choose experts 0 to K - 1 (%s)", (score) => {
  const options = { topk: 4, n_group: 4, topk_group: 2, norm_topk_prob: true, scaling: 1, score };
  expect([...router(ndarray([2, 16]), none, options)[1].data]).toEqual([0, 1, 2, 3, 0, 1, 2, 3]);
});

test.each(SCORES)("chosen experts lie in at most topk_group groups (%s)", (score) => {
  for (const [topk_group, group_best] of [[1, 4], [2, 2], [3, 1]] as const) {
    const options = { topk: 4, n_group: 4, topk_group, group_best, norm_topk_prob: true, scaling: 1, score };
    const [, idx] = router(many, none, options);
    let most = 0;
    for (let t = 0; t < 40; t++) {
      const groups = idx.data.subarray(4 * t, 4 * t + 4).map((e) => Math.floor(e / 4));
      most = Math.max(most, new Set(groups).size);
    }
    expect(most).toBe(topk_group);
  }
});

test("a group's score is the sum of as many of its best as asked for", () => {
  // Group 0 has the largest score, group 1 the largest sum of two.
  const one = ndarray([1, 4], [3, -9, 2, 2]);
  const chosen = (group_best: number) => [...router(one, ndarray([4]), {
    topk: 2, n_group: 2, topk_group: 1, group_best, norm_topk_prob: true, scaling: 1, score: "softmax_chosen",
  })[1].data];
  expect(chosen(1)).toEqual([0, 1]);
  expect(chosen(2)).toEqual([2, 3]);
});

test("equal scores go to the lowest experts", () => {
  const options = { topk: 3, n_group: 1, topk_group: 1, norm_topk_prob: true, scaling: 1 };
  expect([...router(ndarray([1, 8]), ndarray([8]), options)[1].data]).toEqual([0, 1, 2]);
});

test.each([true, false])("router gradient is the finite difference (normalised: %s)", (norm_topk_prob) => {
  const options = { topk: 3, n_group: 4, topk_group: 2, norm_topk_prob, scaling: 2.5 };
  const g = ndarray([1, 3], [0.7, -1.1, 0.4]);
  const value = (x: number[]) =>
    router(ndarray([1, 8], x), bias, options)[0].data.reduce((sum, w, k) => sum + w * g.data[k]!, 0);
  const [dlogits] = router_vjp([g, null], logits, bias, options);
  for (let e = 0; e < 8; e++) {
    const moved = (by: number) => value([...logits.data].map((x, i) => (i === e ? x + by : x)));
    expect(dlogits!.data[e]).toBeCloseTo((moved(1e-5) - moved(-1e-5)) / 2e-5, 8);
  }
});

test("auxiliary loss and its gradient", () => {
  const counts = router_aux_counts(sequence, { topk: 2, sequences: 1 });
  expect([...counts.data]).toEqual([2, 2, 1, 1]);
  const options = { coeff: 0.01 };
  expectClose(router_aux_loss(sequence, counts, options).data, [0.009814119685985], 5e-16);
  const [dlogits] = router_aux_loss_vjp([ndarray([], [1])], sequence, counts, options);
  expectClose(dlogits!.data, [
    9.8214258e-5, 1.1739224e-4, -1.0980318e-4, -9.7205409e-5, 1.0366646e-4, 8.7145692e-5,
    -1.3835793e-4, -1.3939734e-4, 1.1499705e-4, 1.3745215e-4, -3.7000031e-5, -8.4668555e-5,
  ], 6e-12);
});

test.each(SCORES)("a router that prefers no expert has an auxiliary loss of exactly coeff (%s)", (score) => {
  const even = ndarray([6, 8]);
  const counts = router_aux_counts(even, { topk: 2, sequences: 3 });
  expect([...counts.data]).toEqual(Array.from({ length: 24 }, (_, i) => (i % 8 < 2 ? 2 : 0)));
  expectClose(router_aux_loss(even, counts, { coeff: 0.01, score }).data, [0.01], 1e-17);
});

test.each(SCORES)("shares of two ranks with added counts are the loss of one (%s)", (score) => {
  const drawn = Array.from({ length: 24 }, (_, i) => Math.sin(3.7 * i * i));
  const options = { topk: 2, sequences: 1 };
  const parts = [ndarray([3, 4], drawn.slice(0, 12)), ndarray([3, 4], drawn.slice(12))];
  const counts = router_aux_counts(parts[1]!, options, router_aux_counts(parts[0]!, options));
  const [a, b] = parts.map((part) =>
    router_aux_loss(part, counts, { coeff: 0.1, score, tokens: 6 }).data[0]!) as [number, number];
  const whole = ndarray([6, 4], drawn);
  const together = router_aux_loss(whole, router_aux_counts(whole, options), { coeff: 0.1, score });
  expectClose([a + b], [...together.data], 1e-15);
});

test("the z-loss of even logits is coeff log(E)^2", () => {
  const even = ndarray([5, 8]);
  expectClose(router_z_loss(even, { coeff: 0.1 }).data, [0.1 * Math.log(8) ** 2], 1e-15);
  const [dlogits] = router_z_loss_vjp([ndarray([], [1])], even, { coeff: 0.1 });
  expectClose([dlogits!.data[3]!], [(0.1 / 5) * 2 * Math.log(8) / 8], 1e-16);
});

test("the bias falls for busy experts and rises for idle ones", () => {
  const counts = expert_load(ndarray([4]), ndarray([3, 2], [0, 3, 1, 0, 2, 1]));
  expect([...counts.data]).toEqual([2, 2, 1, 1]);
  expectClose(update_expert_bias(ndarray([4]), counts, 1e-3).data, [-1e-3, -1e-3, 1e-3, 1e-3], 0);
  expectClose(update_expert_bias(ndarray([2]), ndarray([2], [3, 3]), 1e-3).data, [0, 0], 0);
});

test("sinkhorn: rows sum to 1 / T, columns to 1 / E", () => {
  const [T, E] = [40, 16];
  const logitsOfMany = ndarray([T, E], many.data.map((x, i) => 2 * x + (i % E) / 4));
  const balanced = sinkhorn(logitsOfMany);
  for (let e = 0; e < E; e++) {
    const column = balanced.data.filter((_, i) => i % E === e).reduce((a, b) => a + b);
    expect(Math.abs(E * column - 1)).toBeLessThan(1e-3);
  }
  for (let t = 0; t < T; t++) {
    const row = balanced.data.subarray(t * E, (t + 1) * E).reduce((a, b) => a + b);
    expect(Math.abs(T * row - 1)).toBeLessThan(1e-3);
  }
});

test("quantile balancing evens out a skewed router", () => {
  const [T, E, K] = [256, 8, 2];
  const skewed = ndarray([T, E], new Draw(5).normal([T, E]).data.map((x, i) => x + 0.6 * (i % E)));
  const options = { topk: K, n_group: 1, topk_group: 1, norm_topk_prob: true, scaling: 1, choice: "logits" };
  const unevenness = (biases: NdArray) => {
    const [, idx] = router(skewed, biases, options as RouterOptions);
    return (Math.max(...expert_load(ndarray([E]), idx).data) * E) / (T * K);
  };
  let biases = ndarray([E]);
  expect(unevenness(biases)).toBeGreaterThan(2);
  for (let step = 0; step < 30; step++) {
    biases = update_quantile_bias(biases, router_quantile(skewed, biases, { topk: K }), 0.5);
  }
  expect(unevenness(biases)).toBeLessThan(1.1);
  expect(biases.data.reduce((a, b) => a + b)).toBeCloseTo(0, 12);
});

test("jitter stays within its amount and belongs to the token, not to its place", () => {
  const counter = ndarray([4], [1, 2, 3, 0]);
  const ones = ndarray([8, 6], Array<number>(48).fill(1));
  const whole = router_jitter(ones, counter, { stream: 9, amount: 0.1 }).data;
  for (const y of whole) expect(Math.abs(y - 1)).toBeLessThanOrEqual(0.1);
  expect(Math.max(...whole) - Math.min(...whole)).toBeGreaterThan(0.1);
  const two = ndarray([2, 6], Array<number>(12).fill(1));
  const part = router_jitter(two, counter, { stream: 9, amount: 0.1 }, ndarray([2], [5, 2])).data;
  expect([...part]).toEqual([...whole.subarray(30, 36), ...whole.subarray(12, 18)]);
});

test("random logits have mean 0 and variance 1", () => {
  const { data } = random_logits(ndarray([200, 16]), ndarray([4], [1, 2, 3, 0]), { stream: 1 });
  const mean = data.reduce((a, b) => a + b) / data.length;
  const variance = data.reduce((sum, x) => sum + x * x, 0) / data.length;
  expect(Math.abs(mean)).toBeLessThan(4 / Math.sqrt(data.length));
  expect(Math.abs(variance - 1)).toBeLessThan(0.1);
});
