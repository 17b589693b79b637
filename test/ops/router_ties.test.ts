import { afterAll, describe, expect, test } from "vitest";
import { router } from "../../src/ops/router.ts";
import { router as reference } from "../../src/reference/router.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { ndarray } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import { testAdapters } from "../support/adapters.ts";

// The op suite cannot hold these cases: where scores are equal the choice has no derivative to compare with.
const rows: Record<string, number[]> = {
  "all equal": [0, 0, 0, 0, 0, 0, 0, 0],
  "two levels": [1, 1, 2, 2, 1, 1, 2, 2],
  "a tie at the threshold": [-1, -1, 3, -1, 3, -1, -1, -1],
  "zeros of both signs": [-0, 0, -0, 0, 0, -0, 0, -0],
  "the last ones": [0, 0, 0, 0, 0, 1, 1, 1],
};
const layouts = [
  { topk: 3, n_group: 1, topk_group: 1 }, { topk: 5, n_group: 1, topk_group: 1 },
  { topk: 3, n_group: 4, topk_group: 2 }, { topk: 1, n_group: 2, topk_group: 1 },
  { topk: 4, n_group: 8, topk_group: 5 },
  { topk: 3, n_group: 1, topk_group: 1, score: "softmax" },
  { topk: 4, n_group: 4, topk_group: 2, group_best: 1, score: "sqrtsoftplus" },
  { topk: 3, n_group: 2, topk_group: 2, group_best: 3, score: "softmax_chosen" },
] as const;

for (const handle of await testAdapters()) {
  // The second device claims to be hardware and gets the arrangement for it: several invocations per token.
  for (const isSoftware of [handle.info.isSoftware, false]) {
    const share = isSoftware ? "one invocation" : "several invocations";
    describe(`${handle.info.id}, ${share} per token`, async () => {
      const device = await openDevice({ adapter: { ...handle, info: { ...handle.info, isSoftware } } });
      afterAll(() => device.destroy());
      test.each(layouts)("equal scores: topk $topk of $topk_group of $n_group groups", async (layout) => {
        const options = { ...layout, norm_topk_prob: true, scaling: 1 };
        const logits = Object.values(rows).flat();
        const shape = [logits.length / 8, 8];
        const [weight, idx] = scope(() =>
          router(device.tensor(logits, shape), device.zeros([8]), options)) as ReturnType<typeof router>;
        const [expectedWeight, expectedIdx] = reference(ndarray(shape, logits), ndarray([8]), options);
        expect([...await idx.read()]).toEqual([...expectedIdx.data]);
        (await weight.read()).forEach((w, i) => expect(w).toBeCloseTo(expectedWeight.data[i]!, 6));
        weight.dispose();
        idx.dispose();
      });
    });
  }
}
