/** Balancing losses against their reference: several at once, over micro-batches and in shares of ranks. */
import { afterAll, describe, expect, test } from "vitest";
import { balanceLoss, type BalanceOptions, type Counting, type Weighed } from "../../src/nn/balance.ts";
import { router_aux_counts, router_aux_loss, router_z_loss } from "../../src/reference/router_loss.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { type NdArray, ndarray } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { Draw } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";

const [T, E, K] = [12, 8, 2];
const NONE = { seq_aux: 0, aux: 0, global_aux: 0, z: 0, sequences: 3 };

for (const handle of await testAdapters()) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    afterAll(() => device.destroy());

    const layer = (logits: NdArray, share = 1): Weighed => ({
      layer: "x", score: "softmax", share,
      logits: device.tensor(Float32Array.from(logits.data), logits.shape),
      weight: device.zeros([logits.shape[0]!, K]), index: device.zeros([logits.shape[0]!, K], "u32"),
    });
    const value = async (logits: NdArray, options: Partial<BalanceOptions>, share = 1) => {
      const loss = scope(() => balanceLoss([layer(logits, share)], { ...NONE, ...options })!);
      const found = await loss.item();
      loss.dispose();
      return found;
    };
    const drawn = (seed: number) => ndarray([T, E], new Draw(seed).normal([T, E]).data);
    const counted = (logits: NdArray, sequences = 1, earlier: NdArray | null = null) =>
      router_aux_counts(logits, { topk: K, sequences }, earlier);
    const aux = (logits: NdArray, counts: NdArray, coeff: number, tokens?: number) => router_aux_loss(
      logits, counts, { coeff, score: "softmax", ...(tokens === undefined ? {} : { tokens }) }).data[0]!;

    test("a router that prefers no expert has every balancing loss at its coefficient", async () => {
      for (const name of ["seq_aux", "aux", "global_aux"] as const) {
        expect(await value(ndarray([T, E]), { [name]: 0.25 })).toBeCloseTo(0.25, 6);
      }
      expect(await value(ndarray([T, E]), { z: 0.25 })).toBeCloseTo(0.25 * Math.log(E) ** 2, 6);
    });

    test("several at once are their sum, times the layer's share", async () => {
      const logits = drawn(1);
      const expected = aux(logits, counted(logits, 3), 0.1) + aux(logits, counted(logits), 0.2) +
        router_z_loss(logits, { coeff: 0.3 }).data[0]!;
      const options = { seq_aux: 0.1, aux: 0.2, z: 0.3 };
      expect(await value(logits, options)).toBeCloseTo(expected, 5);
      expect(await value(logits, options, 0.5)).toBeCloseTo(0.5 * expected, 5);
    });

    test("the loss of a step counts the choices of all its micro-batches so far", async () => {
      const running = device.zeros([1, E], "u32");
      const options = { global_aux: 0.5, soFar: new Map<string, Tensor>([["x", running]]) };
      const [first, second] = [drawn(2), drawn(3)];
      expect(await value(first, options)).toBeCloseTo(aux(first, counted(first), 0.5), 5);
      const both = counted(second, 1, counted(first));
      expect(await value(second, options)).toBeCloseTo(aux(second, both, 0.5), 5);
      expect([...await running.read()]).toEqual([...both.data]);
      running.dispose();
    });

    test("shares of two ranks add up to the loss of one", async () => {
      const parts = [drawn(4), drawn(5)] as const;
      const whole = ndarray([2 * T, E], [...parts[0].data, ...parts[1].data]);
      const counting: Counting = {
        counts: () => device.tensor(Uint32Array.from(counted(parts[1], 1, counted(parts[0])).data), [1, E]),
        ranks: () => 2,
      };
      const options = { aux: 0.3, z: 0.2, counting };
      const shares = [await value(parts[0], options), await value(parts[1], options)] as const;
      const expected = aux(whole, counted(whole), 0.3) + router_z_loss(whole, { coeff: 0.2 }).data[0]!;
      expect(shares[0] + shares[1]).toBeCloseTo(expected, 5);
    });

    test("over data-parallel ranks a step's loss counts in full, or per rank where asked for", async () => {
      const [mine, others] = [drawn(6), drawn(7)];
      const both = counted(others, 1, counted(mine));
      const counting: Counting = {
        counts: () => device.tensor(Uint32Array.from(both.data), [1, E]),
        ranks: (span) => (span === "step" ? 2 : 1),
      };
      const perRank = aux(mine, both, 0.5, 2 * T);
      expect(await value(mine, { global_aux: 0.5, counting })).toBeCloseTo(2 * perRank, 5);
      expect(await value(mine, { global_aux: 0.5, counting, global_aux_per_rank: true }))
        .toBeCloseTo(perRank, 5);
    });
  });
}
