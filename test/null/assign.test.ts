import { expect, test } from "vitest";
import { assignFormats, type Choice } from "../../src/compress/assign.ts";
import { fillUniform } from "../../src/tensor/philox.ts";

const bits = { nvfp4: 4.5, fp8: 8, bf16: 16 } as const;
type Format = keyof typeof bits;

/** Groups of unequal sizes with random costs that fall with the bits. */
function problem(count: number, seed: number): { groups: Choice<Format>[][]; weights: number } {
  const draws = fillUniform({ seed, stream: 0, step: 0 }, new Float32Array(2 * count));
  let weights = 0;
  const groups = Array.from({ length: count }, (_, g) => {
    const size = 100 + Math.floor(900 * draws[2 * g]!);
    weights += size;
    return (Object.keys(bits) as Format[]).map((format) =>
      ({ format, bits: bits[format] * size, cost: 1e-4 * draws[2 * g + 1]! * size / bits[format] ** 2 }));
  });
  return { groups, weights };
}

const total = (choices: readonly Choice<Format>[], key: "bits" | "cost") =>
  choices.reduce((sum, choice) => sum + choice[key], 0);

test("the assignment is the best of all that fit the budget, and costs no more with more of it", async () => {
  let former = Infinity;
  for (const budget of [4.5, 5.5, 7, 10, 16]) {
    const { groups, weights } = problem(6, 7);
    const chosen = await assignFormats(groups, weights, budget);
    expect(total(chosen, "bits")).toBeLessThanOrEqual(budget * weights * (1 + 1e-8));
    let best = Infinity;
    for (let code = 0; code < 3 ** groups.length; code++) {
      const all = groups.map((choices, g) => choices[Math.floor(code / 3 ** g) % 3]!);
      if (total(all, "bits") <= budget * weights * (1 + 1e-12)) best = Math.min(best, total(all, "cost"));
    }
    expect(total(chosen, "cost")).toBeCloseTo(best, 10);
    expect(total(chosen, "cost")).toBeLessThan(former);
    former = total(chosen, "cost");
  }
});

test("a budget that cannot be met is refused with the range", async () => {
  const { groups, weights } = problem(3, 1);
  for (const budget of [4.4, 16.1, NaN]) {
    await expect(assignFormats(groups, weights, budget)).rejects.toThrow(
      new RegExp(`budget must be from 4\\.500 .* to 16\\.000 .* bits per weight, found ${budget}`));
  }
});
