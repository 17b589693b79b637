import { describe, expect, test } from "vitest";
import { conditionsOf, link } from "../../src/kernel/link.ts";

const files: Record<string, string> = {
  "lib/a":
    "const TWO = 2.0;\nfn twice(x: f32) -> f32 { return TWO * x; }\nfn unused(x: f32) -> f32 { return x; }\n",
  "lib/b": "import package::lib::a::twice;\nfn four(x: f32) -> f32 {\n  return twice(twice(x));\n}\n",
  kernel: [
    "// @if(comment) is no condition",
    "import package::lib::b::four;",
    "override WG: u32 = 64;",
    "@if(fast) fn f(x: f32) -> f32 { return four(x); }",
    "@else fn f(x: f32) -> f32 { return x; }",
    "fn g() {",
    "  @if(fast && !f16) let y = 1;",
    "  @else if (true) { let y = 2; } else { let y = 3; }",
    "}",
  ].join("\n"),
};
const source = (name: string) => files[name];

describe("link", () => {
  test("brings in what is imported, its own needs first, and nothing else", () => {
    const { code } = link("kernel", source);
    expect(code).toContain("fn four");
    expect(code.indexOf("const TWO")).toBeLessThan(code.indexOf("fn twice"));
    expect(code.indexOf("fn twice")).toBeLessThan(code.indexOf("fn four"));
    expect(code).not.toContain("unused");
    expect(code).not.toContain("import");
    expect(code.match(/fn twice/g)).toHaveLength(1);
  });

  test("chooses between @if and @else, for declarations and statements", () => {
    const off = link("kernel", source).code;
    const on = link("kernel", source, { conditions: ["fast"] }).code;
    expect(off).toContain("return x; }");
    expect(off).not.toContain("return four(x)");
    expect(off).toMatch(/if \(true\) \{ let y = 2; \} else \{ let y = 3; \}/);
    expect(off).not.toContain("let y = 1");
    expect(on).toContain("return four(x)");
    expect(on).toContain("let y = 1;");
    expect(on).not.toContain("let y = 2");
    expect(link("kernel", source, { conditions: ["fast", "f16"] }).code).toMatch(/^enable f16;/);
  });

  test("maps lines back to their files", () => {
    const { code, origin } = link("kernel", source);
    code.split("\n").forEach((line, i) => {
      const { file, line: number } = origin[i]!;
      if (line.trim() !== "") expect(files[file]!.split("\n")[number - 1]).toContain(line.trim());
    });
  });

  test("turns overrides into constants for tools that need it", () => {
    expect(link("kernel", source, { constants: { WG: 8 } }).code).toContain("const WG: u32 = 8;");
  });

  test("lists conditions and refuses what is missing", () => {
    expect(conditionsOf("kernel", source)).toEqual(["f16", "fast"]);
    expect(() => link("nothing", source)).toThrow(/nothing\.wgsl/);
    const broken = (name: string) => name === "k" ? "import package::lib::a::absent;" : source(name);
    expect(() => link("k", broken)).toThrow(/imports absent from lib\/a\.wgsl/);
    expect(() => link("k", () => "fn f() {}\n@else fn g() {}")).toThrow(/without an @if/);
  });
});
