import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { countMismatches, NUMERIC_CHECKS } from "../../src/cli/bench/numerics.ts";
import { memorySource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { decode_elements, encode_elements } from "../../src/ops/elements.ts";
import { ELEMENTS } from "../../src/tensor/formats.ts";
import { scope } from "../../src/tensor/scope.ts";
import { onEveryAdapter } from "../support/devices.ts";

const golden = await openSafetensors(memorySource("numerics.safetensors",
  readFileSync(new URL("../fixtures/numerics.safetensors", import.meta.url))));

await onEveryAdapter((device) => {
  test.each([
    ["e4m3fn", "round.e4m3fn.sat"], ["e5m2", "round.e5m2.sat"], ["e2m1", "round.e2m1.sat"],
    ["bf16", "round.bf16.sat"], ["f16", "round.f16"], ["e8m0", "round.e8m0.ceil"],
    ["e8m0_floor", "round.e8m0.floor"],
  ] as const)("%s rounds 10,000 values like the exact table", async (format, name) => {
    const x = new Float32Array(new Uint8Array(await golden.read("round.input_bits")).buffer);
    const codes = scope(() => encode_elements(device.tensor(x, [x.length]), format, null));
    const found = await codes.read();
    codes.dispose();
    const wrong = [...await golden.readTensorI32(name)].filter((expected, i) => {
      // The table of f16 holds infinities and NumPy's NaN.
      if (format === "f16" && (Number.isNaN(x[i]) || (expected & 0x7fff) === 0x7c00)) return false;
      return found[i] !== expected;
    });
    expect(wrong).toEqual([]);
  });

  test.each(["e4m3fn", "e5m2", "e2m1", "e8m0", "bf16", "f16"] as const)(
    "every code of %s has the value of the host", async (format) => {
      const codes = Uint32Array.from({ length: 2 ** ELEMENTS[format].bits }, (_, i) => i);
      const values = scope(() => decode_elements(device.tensor(codes, [codes.length]), format));
      const found = await values.read();
      values.dispose();
      expect([...codes].filter((code) => !Object.is(found[code], ELEMENTS[format].decode(code)))).toEqual([]);
    });

  // `krait bench numerics` takes 10^7 patterns of each.
  test.each(NUMERIC_CHECKS)("%s of random bit patterns", async (name) => {
    expect(await countMismatches(device, name, 40_000, 12345)).toBe(0);
  });
});
