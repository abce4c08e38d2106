"use strict";
(() => {
  const all = [...document.querySelectorAll("details.check")];
  const form = document.querySelector(".filters");
  const search = document.getElementById("search");
  const group = document.getElementById("group");
  const node = document.getElementById("node");
  const shown = document.getElementById("shown");
  const none = document.getElementById("none");
  const pills = [...document.querySelectorAll("[data-filter=verdict]")];
  const texts = new Map();
  form.hidden = false;

  const textOf = (check) => {
    if (!texts.has(check)) texts.set(check, check.textContent.toLowerCase());
    return texts.get(check);
  };
  const chosen = () => new Set(pills.filter((p) => p.getAttribute("aria-pressed") === "true").map((p) => p.dataset.value));

  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const verdicts = chosen();
    let count = 0;
    for (const check of all) {
      const fits =
        (!verdicts.size ||
          verdicts.has(check.dataset.verdict) ||
          ["leaked", "slow"].some((mark) => verdicts.has(mark) && mark in check.dataset)) &&
        (!group.value || check.dataset.group === group.value) &&
        (!node.value || check.dataset.nodes.split(" ").includes(node.value)) &&
        words.every((word) => textOf(check).includes(word));
      check.hidden = !fits;
      count += fits;
    }
    shown.value = count === all.length ? `${count} checks` : `${count} of ${all.length} checks`;
    none.hidden = count > 0;
  };

  for (const pill of pills) {
    pill.addEventListener("click", () => {
      pill.setAttribute("aria-pressed", pill.getAttribute("aria-pressed") === "true" ? "false" : "true");
      apply();
    });
  }
  for (const field of [search, group, node]) field.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    for (const pill of pills) pill.setAttribute("aria-pressed", "false");
    setTimeout(apply);
  });
  const opener = document.getElementById("all-open");
  opener.addEventListener("click", () => {
    const open = opener.textContent === "open all";
    for (const check of all) if (!check.hidden) check.open = open;
    opener.textContent = open ? "close all" : "open all";
  });

  const visit = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (!target) return;
    if (target.hidden) form.reset();
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    setTimeout(() => target.scrollIntoView());
  };
  addEventListener("hashchange", visit);

  const whole = (code) => {
    const copy = code.cloneNode(true);
    for (const link of copy.querySelectorAll("[data-program]")) {
      const text = document.querySelector(`pre[data-program="${CSS.escape(link.dataset.program)}"]`).textContent;
      link.textContent = "'" + text.replaceAll("'", "'\\''") + "'";
    }
    return copy.textContent;
  };
  const copyText = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  for (const code of document.querySelectorAll("code.command")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "copy";
    button.addEventListener("click", async () => {
      await copyText(whole(code));
      button.textContent = "copied";
      setTimeout(() => (button.textContent = "copy"), 1500);
    });
    code.after(button);
  }

  let before = [];
  addEventListener("beforeprint", () => {
    before = all.map((check) => check.open);
    for (const check of all) if (!["held", "skipped"].includes(check.dataset.verdict)) check.open = true;
  });
  addEventListener("afterprint", () => all.forEach((check, index) => (check.open = before[index])));

  apply();
  visit();
})();
