"""python -m pentode"""

from pentode.cli import main

main()
