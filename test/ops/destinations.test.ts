import { expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { launchObservers } from "../../src/kernel/launch.ts";
import { add, relu2 } from "../../src/ops/elementwise.ts";
import { expert_tiles, grouped_linear } from "../../src/ops/grouped_linear.ts";
import { linear } from "../../src/ops/linear.ts";
import { linear_cross_entropy } from "../../src/ops/linear_cross_entropy.ts";
import { moe_permute, moe_plan, type MoePlan } from "../../src/ops/moe.ts";
import { moe_weigh } from "../../src/ops/moe_weigh.ts";
import { rms_norm } from "../../src/ops/rms_norm.ts";
import type { Device } from "../../src/tensor/device.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { onEveryAdapter } from "../support/devices.ts";
import { compare, Draw } from "./suite.ts";

const [T, D, E, K] = [19, 12, 3, 2];
interface Shared {
  readonly square: Tensor; readonly gain: Tensor; readonly experts: Tensor; readonly labels: Tensor;
  readonly plan: MoePlan;
}
/** Uses of x [T, D] by ops that add to its gradient in their own store. */
const USES: Readonly<Record<string, (x: Tensor, s: Shared) => Tensor>> = {
  linear: (x, { square }) => linear(x, square, null),
  rms_norm: (x, { gain }) => rms_norm(x, gain, 1e-5),
  permuted: (x, { experts, plan }) =>
    rowsOf(grouped_linear(x, experts, plan.offsets, { permute: { ...plan, topk: K } })),
  copied: (x, { experts, plan }) => rowsOf(grouped_linear(moe_permute(x, plan, K), experts, plan.offsets)),
  cross_entropy: (x, { square, labels }) => linear_cross_entropy(x, square, labels, {}),
};
const rowsOf = (y: Tensor): Tensor => y.reshape([T, K * D]);

await onEveryAdapter((device) => {
  const r = new Draw(11);
  const tensor = (shape: number[], grad = true) => {
    const made = device.tensor(Float32Array.from(r.normal(shape).data), shape);
    made.requiresGrad = grad;
    return made;
  };
  const index = device.tensor(Uint32Array.from(r.integers([T, K], 0, E, "u32").data), [T, K], "u32");
  const labels = device.tensor(Int32Array.from(r.integers([T], 0, D).data), [T], "i32");

  test.each(Object.keys(USES))("%s adds what its input's gradient is so far", async (name) => {
    const shared = {
      square: tensor([D, D], false), gain: tensor([D], false), experts: tensor([E, D, D], false), labels,
      plan: moe_plan(index, E),
    };
    const x = tensor([T, D]);
    const apart = [x, x].map((each) => {
      const copy = device.empty(each.shape);
      copy.copyFrom(each);
      copy.requiresGrad = true;
      return copy;
    }) as [Tensor, Tensor];
    // The plain use runs last, so its gradient is there when the walk back comes to the other.
    const uses = (a: Tensor, b: Tensor) => [USES[name]!(a, shared), add(b, b)];
    const { gradients: both, launches } = await walk(device, () => uses(x, x));
    const { gradients: one } = await walk(device, () => uses(...apart));
    const [first, second] = await Promise.all(apart.map(({ key }) => one.get(key)!.read()));
    const expected = Float64Array.from(first!, (value, i) => value + second![i]!);
    const found = await both.get(x.key)!.read();
    const data = Float64Array.from(found);
    compare(name, { shape: x.shape, data }, { shape: x.shape, data: expected }, 1e-6);
    expect(launches.filter((kernel) => kernel === "elementwise/add")).toHaveLength(1); // that of add(b, b)
  });

  test("a product with the result of a squared ReLU takes its derivative along", async () => {
    const [x, up, down, bias] = [tensor([T, D]), tensor([20, D]), tensor([7, 20]), tensor([20])];
    const leaves = [x, up, down, bias];
    const fused = await walk(device, () =>
      [linear(linear(x, up, bias, null, { activation: "relu2" }), down, null)]);
    const apart = await walk(device, () => [linear(relu2(linear(x, up, bias)), down, null)]);
    expect(fused.launches).not.toContain("matmul/relu2_gradient");
    await same(leaves, fused.gradients, apart.gradients);
    // Somebody else who knows nothing of it may read the same result.
    const mixed = await walk(device, () => {
      const inner = linear(x, up, bias, null, { activation: "relu2" });
      return [linear(inner, down, null), add(inner, inner)];
    });
    const plain = await walk(device, () => {
      const inner = relu2(linear(x, up, bias));
      return [linear(inner, down, null), add(inner, inner)];
    });
    await same(leaves, mixed.gradients, plain.gradients);
  });

  test("so do the products of experts, in either order of rows", async () => {
    const plan = moe_plan(index, E);
    const [x, up, down] = [tensor([T, D]), tensor([E, 20, D]), tensor([E, D, 20])];
    const permute = { ...plan, topk: K };
    const run = (activate: (h: Tensor) => Tensor, given: { activation?: "relu2" }) => walk(device, () => {
      const inner = activate(grouped_linear(x, up, plan.offsets, { permute, ...given }));
      return [grouped_linear(inner, down, plan.offsets, { tiles: expert_tiles(plan.offsets, T * K) })];
    });
    const fused = await run((h) => h, { activation: "relu2" });
    expect(fused.launches).not.toContain("matmul/relu2_gradient");
    await same([x, up, down], fused.gradients, (await run(relu2, {})).gradients);
    const dense = tensor([20, D]);
    const gathered = (inner: Tensor) => [grouped_linear(inner, down, plan.offsets, { permute })];
    const again = await walk(device, () => gathered(linear(x, dense, null, null, { activation: "relu2" })));
    const plain = await walk(device, () => gathered(relu2(linear(x, dense, null))));
    await same([x, dense, down], again.gradients, plain.gradients);
  });

  test("weights between two products of experts take the derivative of the squared ReLU along", async () => {
    const plan = moe_plan(index, E);
    const [x, up, down, weight] = [tensor([T, D]), tensor([E, 20, D]), tensor([E, D, 20]), tensor([T, K])];
    const permute = { ...plan, topk: K };
    const run = (activate: (h: Tensor) => Tensor, given: { activation?: "relu2" }) => walk(device, () => {
      const inner = activate(grouped_linear(x, up, plan.offsets, { permute, ...given }));
      return [grouped_linear(moe_weigh(inner, weight, plan), down, plan.offsets)];
    });
    const fused = await run((h) => h, { activation: "relu2" });
    expect(fused.launches).not.toContain("matmul/relu2_gradient");
    await same([x, up, down, weight], fused.gradients, (await run(relu2, {})).gradients);
  });

  test("a gradient is written where it is wanted, and added there the second time", async () => {
    const [x, weight] = [tensor([T, D]), tensor([D, D])];
    const place = device.zeros([D, D]);
    const expected = await walk(device, () => [linear(linear(x, weight, null), weight, null)]);
    const found = await walk(
      device, () => [linear(linear(x, weight, null), weight, null)], new Map([[weight.key, place]]));
    expect(found.gradients.get(weight.key)!.storage).toBe(place.storage);
    await same([x, weight], found.gradients, expected.gradients);
  });

  test("gradients of weights come later, in launches of their own, with the same bits", async () => {
    const plan = moe_plan(index, E);
    const [x, up, down, bias] = [tensor([T, D]), tensor([E, 20, D]), tensor([E, D, 20]), tensor([D])];
    const [square, made] = [tensor([D, D]), tensor([D, D])];
    const leaves = [x, up, down, bias, square, made];
    const body = () => {
      const first = linear(linear(x, square, bias), square, null);
      const inner = grouped_linear(
        first, up, plan.offsets, { permute: { ...plan, topk: K }, activation: "relu2" });
      // A weight that is a result itself cannot wait: somebody is behind it.
      return [grouped_linear(inner, down, plan.offsets), linear(first, add(made, made), null)];
    };
    const expected = await walk(device, body);
    const later = await walk(device, body, undefined, true);
    expect(later.launches.toSorted()).toEqual(expected.launches.toSorted());
    expect(later.launches).not.toEqual(expected.launches);
    for (const { key } of leaves) {
      expect(await later.gradients.get(key)!.read()).toEqual(await expected.gradients.get(key)!.read());
    }
  });
});

type Gradients = Map<number, Tensor>;

async function same(leaves: Tensor[], found: Gradients, expected: Gradients): Promise<void> {
  for (const { key, shape } of leaves) {
    const [a, b] = await Promise.all([found, expected].map((map) => map.get(key)!.read()));
    const [ours, theirs] = [Float64Array.from(a!), Float64Array.from(b!)];
    compare("a gradient", { shape, data: ours }, { shape, data: theirs }, 1e-5);
  }
}

/** Gradients of the sum of all elements of the outputs of `body`, and the kernels of the walk back. */
async function walk(
  device: Device, body: () => Tensor[], places?: Map<number, Tensor>, postpone = false,
): Promise<{ gradients: Map<number, Tensor>; launches: string[] }> {
  const tape = new Tape();
  const outputs = tape.run(body);
  const seeds = outputs.map(({ shape, size }) => device.tensor(
    Float32Array.from({ length: size }, (_, i) => 1 + (i % 5)), shape));
  const launches: string[] = [];
  const observe = (kernel: string) => void launches.push(kernel);
  launchObservers.add(observe);
  const back = tape.walk(outputs, seeds, places);
  for (let left = tape.length; left-- > 0;) back.to(left, postpone);
  const gradients = back.end();
  launchObservers.delete(observe);
  await device.finish();
  return { gradients, launches };
}
