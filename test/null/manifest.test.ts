import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { manifestText } from "../../src/kernel/reflect.ts";
import { ROOT } from "../support/imports.ts";

test("the checked-in manifest is what the shaders say; `npm run manifest` renews it", () => {
  expect(readFileSync(join(ROOT, "src/kernel/manifest.ts"), "utf8")).toBe(manifestText());
});
