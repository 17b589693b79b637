import { readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { fixture, krait, withFolder } from "./krait.ts";

interface Report {
  readonly adapter: string;
  readonly classes: number;
  readonly undecided: number;
  readonly spent_ms: number;
  readonly decisions: readonly { choice: string | null; ms: Record<string, number>; rejected: Record<string,
    string> }[];
}

const small = ["--config", fixture("micro.json"), "--batch", "1", "--seqlen", "16", "--prompt", "8"];

describe("tune", () => {
  test("measures, keeps, shows a table, goes on and starts over", () => withFolder(async (folder) => {
    const tune = (...args: string[]) => krait(
      ["tune", ...small, ...args], undefined, { KRAIT_TUNER: "", KRAIT_CACHE: folder });
    const report = async (...args: string[]) => {
      const { code, stdout, stderr } = await tune("--json", ...args);
      expect(code, stderr).toBe(0);
      return JSON.parse(stdout) as Report;
    };
    const none = await report("--budget", "0s");
    expect(none.classes).toBeGreaterThan(3);
    expect(none).toMatchObject({ undecided: none.classes, decisions: [] });
    const some = await report("--budget", "15s");
    expect(some.undecided).toBeLessThan(none.classes);
    for (const { choice, ms, rejected } of some.decisions) {
      if (choice !== null) expect(Object.keys({ ...ms, ...rejected })).toContain(choice);
    }
    const [file] = readdirSync(join(folder, "tuning"));
    expect(file).toContain(some.adapter);
    const shown = await tune("--budget", "0s");
    expect(shown.stdout).toMatch(/tunable +class +candidates, ms +choice +default/);
    expect(shown.stdout).toMatch(/matmul\/product +m=\d+ n=\d+/);
    expect(shown.stdout).toContain(`Kept in ${join(folder, "tuning", file!)}`);
    // A damaged file is as good as none, for every command.
    writeFileSync(join(folder, "tuning", file!), '{"format": "krait-tun');
    expect((await report("--budget", "0s")).undecided).toBe(none.classes);
    await report("--budget", "0s", "--reset");
    expect(readdirSync(join(folder, "tuning"))).toEqual([]);
  }), 120_000);

  test("refuses what it cannot do, in a sentence", async () => {
    const off = await krait(["tune", ...small], undefined, { KRAIT_TUNER: "off" });
    expect(off).toMatchObject({ code: 2 });
    expect(off.stderr).toContain("switched off by KRAIT_TUNER=off");
    const odd = await krait(["tune", "--budget", "soon"]);
    expect(odd).toMatchObject({ code: 2 });
    expect(odd.stderr).toContain('--budget must be a time such as 10s or 2min, found "soon"');
  });
});
