import { expect, test } from "vitest";
import { add } from "../../src/ops/elementwise.ts";
import { onEveryAdapter } from "../support/devices.ts";

await onEveryAdapter((device) => {
  test.each(["f16", "bf16"] as const)("%s tensors take half the bytes and read back what was rounded",
    async (dtype) => {
    const x = device.tensor([1, 2, 1 + 2 ** -12, -3, 0.5], [5], dtype);
    expect(x.byteLength).toBe(12);
    expect([...await x.read()]).toEqual([1, 2, 1, -3, 0.5]);
    const y = device.tensor(Float32Array.of(7, 8, 9, 10, 11), [5], dtype);
    y.copyFrom(x);
    y.write(Float32Array.of(4, 6));
    expect([...await y.read()]).toEqual([4, 6, 1, -3, 0.5]);
    expect(() => y.write(Float32Array.of(1))).toThrow(/write: .* takes an even count of values, found 1/);
    expect(() => y.copyFrom(device.zeros([5]))).toThrow(`copyFrom: expected ${dtype} elements, found f32`);
    for (const tensor of [x, y]) tensor.dispose();
  });

  test("an op that does not know halves refuses them", () => {
    const [a, b] = [device.zeros([4]), device.zeros([4], "f16")];
    expect(() => add(a, b)).toThrow("add: argument 2 must be f32, found f16.");
    for (const tensor of [a, b]) tensor.dispose();
  });
});
