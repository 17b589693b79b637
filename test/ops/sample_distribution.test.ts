import { afterAll, describe, expect, test } from "vitest";
import { sample } from "../../src/ops/sample.ts";
import { probabilities, sample as reference } from "../../src/reference/sample.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { ndarray } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import { testAdapters } from "../support/adapters.ts";

const B = 4096;

/** The 99.9 % point of chi-square with n degrees of freedom (Wilson and Hilferty). */
const chiSquareLimit = (n: number): number => n * (1 - 2 / (9 * n) + 3.0902 * Math.sqrt(2 / (9 * n))) ** 3;

/** Chi-square of counts against probabilities; throws for a draw that has probability zero. */
function chiSquare(draws: ArrayLike<number>, p: ArrayLike<number>): { value: number; freedom: number } {
  const counts = new Float64Array(p.length);
  for (const token of Array.from(draws)) counts[token]!++;
  let value = 0;
  let freedom = -1;
  counts.forEach((count, token) => {
    if (p[token] === 0) return expect(count, `draws of token ${token}, which was filtered out`).toBe(0);
    const expected = p[token]! * draws.length;
    value += (count - expected) ** 2 / expected;
    freedom++;
  });
  return { value, freedom };
}

const logits = [0.3, 1.7, -0.4, 0.9, 2.1, -1.2, 0.9, 0.1, 1.1, -0.7, 0.6].map(Math.fround);
const rowsOf = (row: number[], count: number): number[] => Array.from({ length: count }, () => row).flat();

for (const handle of await testAdapters()) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    afterAll(() => device.destroy());
    const draw = async (row: number[], settings: number[], counter: number[], count = B) => {
      const token = scope(() => sample(
        device.tensor(rowsOf(row, count), [count, row.length]), device.tensor(settings, [4]),
        device.tensor(counter, [4], "u32")));
      const values = [...await token.read()];
      token.dispose();
      return values;
    };

    test.each([
      ["no filter", [1, 0, 1, 0]], ["temperature", [0.7, 0, 1, 0]], ["top-k", [1, 4, 1, 0]],
      ["top-p", [1, 0, 0.8, 0]], ["min-p", [1, 0, 1, 0.2]], ["all of them", [1.5, 9, 0.9, 0.25]],
    ])("draws follow the distribution: %s", async (_, settings) => {
      const p = probabilities(ndarray([1, 11], logits), ndarray([4], settings.map(Math.fround)));
      const { value, freedom } = chiSquare(await draw(logits, settings, [2024, 0, 5, 1]), p.data);
      expect(freedom).toBeGreaterThan(0);
      expect(value).toBeLessThan(chiSquareLimit(freedom));
    });

    test("every draw is the reference's", async () => {
      const counter = [7, 9, 11, 13];
      const settings = [1, 0, 1, 0];
      const expected = reference(
        ndarray([B, 11], rowsOf(logits, B)), ndarray([4], settings), ndarray([4], counter));
      const found = await draw(logits, settings, counter);
      // A uniform within rounding of a boundary may fall on its other side; once in 4096 is already rare.
      expect(found.filter((token, b) => token !== expected.data[b]).length).toBeLessThanOrEqual(1);
    });

    test("a row's draw depends on its number, not on the rows around it", async () => {
      const many = await draw(logits, [1, 0, 1, 0], [1, 2, 3, 4], 300);
      expect(await draw(logits, [1, 0, 1, 0], [1, 2, 3, 4], 77)).toEqual(many.slice(0, 77));
    });

    test.each([0, 1, 2, 3])("word %i of the counter matters", async (word) => {
      const counter = [1, 2, 3, 4];
      const base = await draw(logits, [1, 0, 1, 0], counter, 100);
      expect(await draw(logits, [1, 0, 1, 0], counter.with(word, 99), 100)).not.toEqual(base);
    });

    test("a captured draw is replayed with a new counter and new settings", async () => {
      const [x, settings, counter] = scope(() => [
        device.tensor(rowsOf(logits, 50), [50, 11]), device.tensor([1, 0, 1, 0], [4]),
        device.tensor([1, 2, 3, 4], [4], "u32"),
      ] as const);
      const { graph, result } = device.capture(() => sample(x, settings, counter));
      for (const step of [5, 6]) {
        counter.write(Uint32Array.of(1, 2, step, 4));
        settings.write(Float32Array.of(0.5 + step / 10, step, 0.9, 0));
        device.replay(graph);
        expect([...await result.read()]).toEqual(
          await draw(logits, [0.5 + step / 10, step, 0.9, 0].map(Math.fround), [1, 2, step, 4], 50));
      }
      result.dispose();
      device.stream.disposeGraph(graph);
      for (const tensor of [x, settings, counter]) tensor.dispose();
    });
  });
}
