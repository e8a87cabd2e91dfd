// What scrolls sideways can be reached and moved with the keyboard; nothing else becomes a stop.
(() => {
  const mark = () => document.querySelectorAll("main pre, main .katex-display, main table, main .drawing").forEach((box) => {
    const scrolls = box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
    if (scrolls && getComputedStyle(box).overflowX !== "visible") box.tabIndex = 0;
    else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  });
  addEventListener("load", () => { mark(); setTimeout(mark, 300); });
  addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true);
})();
