"""x"""
from hypothesis import strategies as st
CASES = st.integers()
def judge(case, folder):
    return "right"
