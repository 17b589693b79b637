import { readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { openFile } from "../../src/io/files.node.ts";
import {
  encodeSafetensors, openSafetensors, type TensorEntry, type TensorReader,
} from "../../src/io/safetensors.ts";
import { f32ToBf16, f32ToE4m3 } from "../../src/tensor/dtype.ts";
import { fixture, here, krait, withFolder } from "./krait.ts";

const bytesOf = (values: Float32Array) => new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
const tensor = (name: string, shape: number[], values: Float32Array): TensorEntry =>
  ({ name, dtype: "F32", shape, bytes: bytesOf(values) });
const wave = (count: number) => Float32Array.from({ length: count }, (_, i) => Math.sin(i) * (1 + (i % 5)));

async function reader(path: string): Promise<TensorReader> {
  return openSafetensors((await openFile(path))!);
}

describe("krait numerics", () => {
  test("writes what the exact tables hold, whatever the rank", () => withFolder(async (folder) => {
    const [input, out] = [join(folder, "in.safetensors"), join(folder, "out.safetensors")];
    const golden = await reader(fixture("block_formats.safetensors"));
    const matrix = await golden.readTensorF32("block.x");
    const odd = Float32Array.of(NaN, Infinity, -1e9, 0.3, -0);
    writeFileSync(input, await encodeSafetensors([
      tensor("x", [64, 128], matrix), tensor("stack", [2, 32, 128], matrix),
      tensor("row", [64 * 128], matrix), tensor("none", [0, 32], new Float32Array(0)),
      { name: "ids", dtype: "I64", shape: [1], bytes: new Uint8Array(8) },
    ]));
    const formats = "mxfp8_e4m3,mxfp8_e5m2, mxfp4,nvfp4,e4m3fn,bf16";
    const run = await krait(["numerics", "--input", input, "--out", out, "--formats", formats, "--json"]);
    expect(run.stderr).toBe("");
    expect(JSON.parse(run.stdout)).toMatchObject({ tensors: 4, skipped: [{ name: "ids", dtype: "I64" }] });
    expect(readdirSync(folder).sort()).toEqual(["in.safetensors", "out.safetensors"]);
    const found = await reader(out);
    const columns = { x: [64, 128], stack: [2, 32, 128], row: [8192] };
    for (const [name, shape] of Object.entries(columns)) {
      for (const [format, block] of
        [["mxfp8_e4m3", 32], ["mxfp8_e5m2", 32], ["mxfp4", 32], ["nvfp4", 16]] as const) {
        const table = `block.x.${format}${format === "nvfp4" ? "" : ".floor"}`;
        const part = (of: string) => `${name}.${format}.${of}`;
        expect(await found.read(part("codes"))).toEqual(await golden.read(`${table}.codes`));
        expect(await found.read(part("scales"))).toEqual(await golden.read(`${table}.scales`));
        expect([found.info(part("codes")).dtype, found.info(part("codes")).shape]).toEqual(["U8", shape]);
        expect(found.info(part("scales"))).toMatchObject(
          { dtype: "U8", shape: [...shape.slice(0, -1), shape.at(-1)! / block] });
        expect(found.info(part("dequant"))).toMatchObject({ dtype: "F32", shape });
      }
      expect(found.info(`${name}.nvfp4.global_scale`)).toMatchObject({ dtype: "F32", shape: [] });
      expect(await found.read(`${name}.e4m3fn.codes`)).toEqual(Uint8Array.from(matrix, (v) => f32ToE4m3(v)));
      const halves = new Uint16Array((await found.read(`${name}.bf16.codes`)).slice().buffer);
      expect(halves).toEqual(Uint16Array.from(matrix, (v) => f32ToBf16(v, true)));
      expect(found.info(`${name}.bf16.codes`).dtype).toBe("U16");
    }
    expect(found.info("none.mxfp4.scales").shape).toEqual([0, 1]);
    expect([...found.tensors.keys()].some((name) => name.startsWith("ids"))).toBe(false);
    await found.close();

    writeFileSync(input, await encodeSafetensors([tensor("t", [1, 5], odd)]));
    await here(["numerics", "--input", input, "--out", out, "--formats", "e4m3fn,e5m2,e2m1,bf16"]);
    const small = await reader(out);
    expect([...await small.read("t.e4m3fn.codes")]).toEqual([0x7f, 0x7e, 0xfe, 0x2a, 0x80]);
    expect([...await small.read("t.e5m2.codes")]).toEqual([0x7f, 0x7b, 0xfb, 0x35, 0x80]);
    expect([...await small.read("t.e2m1.codes")]).toEqual([7, 7, 15, 1, 8]);
    expect([...new Uint16Array((await small.read("t.bf16.codes")).slice().buffer)].slice(0, 2))
      .toEqual([0x7fc0, 0x7f7f]);
    await small.close();
    await golden.close();
  }));

  test("the rule of the scales, tiles, and formats with f32 scales", () => withFolder(async (folder) => {
    const [input, out] = [join(folder, "in.safetensors"), join(folder, "out.safetensors")];
    const golden = await reader(fixture("block_formats.safetensors"));
    writeFileSync(input, await encodeSafetensors([
      tensor("x", [64, 128], await golden.readTensorF32("block.x"))]));
    const run = await here([
      "numerics", "--input", input, "--out", out, "--formats", "mxfp4,nvfp4_16x16,fp8_e4m3", "--scale-rule",
      "ceil",
    ]);
    expect(run.stdout).toContain("10 tensors written");
    const found = await reader(out);
    for (const [name, table] of [["mxfp4", "mxfp4.ceil"], ["nvfp4_16x16", "nvfp4_16x16"]] as const) {
      for (const part of ["codes", "scales"]) {
        expect(await found.read(`x.${name}.${part}`)).toEqual(await golden.read(`block.x.${table}.${part}`));
      }
    }
    expect(found.info("x.nvfp4_16x16.scales").shape).toEqual([4, 8]);
    expect(found.info("x.fp8_e4m3.scales")).toMatchObject({ dtype: "F32", shape: [] });
    // The matrix has the same codes in either order of operations; the tensor's scale may be another float.
    writeFileSync(input, await encodeSafetensors([
      tensor("x", [64, 128], await golden.readTensorF32("block.x_normal"))]));
    await here(["numerics", "--input", input, "--out", out, "--formats", "nvfp4", "--reciprocals"]);
    const other = await reader(out);
    expect(await other.read("x.nvfp4.codes")).toEqual(await golden.read("block.x_normal.nvfp4.codes"));
    const normal = await golden.readTensorF32("block.x_normal");
    const amax = normal.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
    expect((await other.readTensorF32("x.nvfp4.global_scale"))[0]).toBe(
      Math.fround(1 / Math.fround(2688 / amax)));
    await other.close();
    await found.close();
    await golden.close();
  }));

  test("what it cannot do is one sentence, and no output", () => withFolder(async (folder) => {
    const write = async (name: string, entries: TensorEntry[]) => {
      writeFileSync(join(folder, name), await encodeSafetensors(entries));
      return join(folder, name);
    };
    const odd = await write("odd", [tensor("ok", [2, 32], wave(64)), tensor("w", [3, 40], wave(120))]);
    const flat = await write("flat", [tensor("v", [256], wave(256))]);
    const nan = await write("nan", [tensor("n", [1, 32], wave(32).fill(NaN, 7, 8))]);
    const ids = await write("ids", [{ name: "ids", dtype: "I32", shape: [2], bytes: new Uint8Array(8) }]);
    const cases = [
      [odd, "mxfp4", 1, /tensor "w": mxfp4 has blocks of 32: .*multiple of 32, found \[3, 40\]/],
      [flat, "nvfp4_16x16", 1, /tensor "v": nvfp4_16x16 .* at least two dimensions, found \[256\]/],
      [nan, "e5m2,mxfp4", 1, /tensor "n": mxfp4 needs finite values, found NaN at element 7/],
      [ids, "e5m2", 1, /ids: expected a tensor of dtype F32, found ids \(I32\)/],
      [join(folder, "missing"), "e5m2", 2, /input file .*missing does not exist/],
      [odd, "e5m2,nvfp", 2, /a format must be one of .*, found "nvfp"; did you mean "nvfp4"\?/],
      [odd, "e5m2 --reciprocals", 2, /--reciprocals is for nvfp4 and nvfp4_16x16, found e5m2/],
      [odd, ",", 2, /--formats needs one of e4m3fn, .*, found ","/],
    ] as const;
    await Promise.all(cases.map(async ([input, formats, code, message], i) => {
      const out = join(folder, `out${i}`);
      const run = await here(
        ["numerics", "--input", input, "--out", out, "--formats", ...formats.split(" ")]);
      expect([run.code, run.stdout]).toEqual([code, ""]);
      expect(run.stderr).toMatch(message);
    }));
    expect(readdirSync(folder).filter((name) => name.startsWith("out"))).toEqual([]);
  }));
});
